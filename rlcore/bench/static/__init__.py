"""What compiled kernels show without a GPU: registers, access widths, bytes, recompilations."""
