"""The only place that knows a model family: its parts, its folder, its inputs, its layers."""
