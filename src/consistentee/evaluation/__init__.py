"""What a model is worth: quality, layers and time."""
