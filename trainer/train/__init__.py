"""Training: the job of a rank, the loop, fine-tuning, evaluation, prediction."""
