"""Token-level early exit in causal language models: data, training and generation."""
