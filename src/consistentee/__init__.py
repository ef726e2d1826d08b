"""Early exiting for transformers that you can train, trust, tune and serve."""

__version__ = "0.1.0"
