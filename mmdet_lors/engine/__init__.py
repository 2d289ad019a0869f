"""What a run needs around the model: launch, checkpoints, and checks of its inputs before it starts."""
