"""Attention over the KV cache, and the accounting of the cache."""
