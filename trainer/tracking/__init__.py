"""Loggers of a run: `metrics.jsonl`, Weights & Biases and the user's own."""
