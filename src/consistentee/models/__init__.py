"""The Hugging Face classes: configuration, models, what loads and describes them."""
