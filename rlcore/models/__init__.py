"""Loading, one forward pass, adapters, and the heads that losses are computed through."""
