"""What compiled kernels show without a GPU."""
