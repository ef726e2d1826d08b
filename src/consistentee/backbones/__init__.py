"""Hugging Face's models, layer by layer."""
