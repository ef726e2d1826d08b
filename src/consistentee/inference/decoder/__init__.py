"""Decoding where every token leaves at a layer of its own."""
