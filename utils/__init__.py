"""Options, checkpoints, run folders, distributed launch, figures: all around the network, nothing of the network."""
