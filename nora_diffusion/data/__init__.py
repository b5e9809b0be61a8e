"""Photos, prompts and their order; knows nothing of models."""
