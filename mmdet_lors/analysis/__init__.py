"""What a model costs, counted from what its config builds; what the studies and tools that measure share."""
