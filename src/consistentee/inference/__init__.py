"""Early exit on the clock. Knows parts of models, not models."""
