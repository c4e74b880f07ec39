"""From logits (N, V): public function, autograd, operator."""
