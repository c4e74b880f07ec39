"""From hidden states (N, H) and the head's weight (V, H), and never (N, V)."""
