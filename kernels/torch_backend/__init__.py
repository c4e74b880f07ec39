"""How everything else computes it: blocks of rows, hand-written gradients."""
