"""Whole answers (B,): preference losses and KTO."""
