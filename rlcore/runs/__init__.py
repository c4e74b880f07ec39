"""A run on disk and on screen: config, output directory, checkpoints, metrics."""
