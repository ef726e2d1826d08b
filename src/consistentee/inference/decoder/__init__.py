"""Decoding where every token exits at a layer of its own."""
