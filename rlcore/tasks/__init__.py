"""Tasks that are made on the spot: data, tokenizer, tiny model and verifier."""
