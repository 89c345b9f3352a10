"""Weights in few bits: number formats, and rounding that looks at the data."""
