"""The formulas: pure functions of tensors for rows and tokens alike."""
