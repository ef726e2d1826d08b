"""Batches of rows through an encoder whose rows exit at different layers."""
