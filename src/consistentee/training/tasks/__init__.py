"""What training has of its own for rows and for tokens."""
