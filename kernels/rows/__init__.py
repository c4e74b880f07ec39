"""From logits (N, V): public functions, their autograd functions and operators."""
