"""The embedded task and what is trained on it."""
