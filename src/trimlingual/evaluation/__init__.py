"""Quality and cost of a model: scores, languages of answers, bytes, memory, time."""
