"""What an algorithm is: scalars of a token, a pair or a sequence, in tables."""
