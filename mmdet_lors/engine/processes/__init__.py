"""Several processes in one run: how they stop together, find each other and start again."""
