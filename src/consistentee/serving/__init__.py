"""A model as a service over HTTP: `consistentee serve` (extra `serve`)."""
