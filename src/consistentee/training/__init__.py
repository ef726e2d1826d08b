"""Training runs: their steps, phases, methods and tasks."""
