"""Along time (B, T): returns, advantages, shaped rewards."""
