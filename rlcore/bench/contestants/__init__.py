"""Ours and the peers' implementations of each operation."""
