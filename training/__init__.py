"""What the training scripts share: the loop, checkpoints, resuming, cost, adapters."""
