"""rlcore's losses in other trainers; a peer is imported when something of it is patched."""
