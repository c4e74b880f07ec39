"""From files to padded token ids: rows, encoding, preference pairs."""
