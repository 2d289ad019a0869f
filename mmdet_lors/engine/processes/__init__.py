"""Several processes as one run: stopping together, finding each other, starting again."""
