"""How a GPU computes it: Triton kernels, and the tiles and launches that they share."""
