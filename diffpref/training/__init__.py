"""Training: from a config to an aligned model, resumable at any moment."""
