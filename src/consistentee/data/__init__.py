"""From files and hubs to rows and batches."""
