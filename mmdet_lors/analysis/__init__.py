"""What a model costs, counted from what its config builds, and how that compares with the LORS paper's tables."""
