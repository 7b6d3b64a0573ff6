"""Held-out loss on source code in eight languages: the paper's first table in miniature."""
