"""What the tests of the kernels share: the oracle, the judge, and proofs that need no GPU."""

import torch

# Kernels run on a GPU where there is one, else in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
