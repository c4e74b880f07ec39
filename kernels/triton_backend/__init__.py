"""How a GPU computes it: Triton kernels and their launches."""
