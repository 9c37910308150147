"""Loggers of a run: `metrics.jsonl`, Weights & Biases and user-defined loggers."""
