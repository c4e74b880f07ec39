"""How every other device computes it: PyTorch by blocks of rows, with gradients by hand."""
