"""Training: the job of a rank, the training loop, fine-tuning, evaluation, prediction."""
