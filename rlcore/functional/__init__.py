"""Losses, advantages and corrections in plain PyTorch, without a model."""
