"""Training: an adapter is put on a model, trained on a mixture of tasks, and saved."""
