"""Losses, advantages, corrections and solvers in plain PyTorch, without a model."""
