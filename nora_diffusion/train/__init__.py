"""Training recipes, one file a modality, and the functions they share."""
