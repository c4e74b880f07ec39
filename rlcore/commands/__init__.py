"""What `rlcore` does besides training: evaluate, chat, compare, merge, env."""
