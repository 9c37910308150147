"""Checkpoints in the formats of others: safetensors, Hugging Face, ONNX."""
