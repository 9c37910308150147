"""Export of checkpoints to other formats: safetensors, Hugging Face, ONNX, Lightning."""
