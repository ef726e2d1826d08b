"""What sits on a layer: internal classifiers, exit heads, policy networks."""
