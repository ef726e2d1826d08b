"""Batches of rows through an encoder whose rows leave at different layers."""
