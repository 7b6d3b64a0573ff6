"""Adapters at rest: the registry, its object stores, the file formats, and the caches on a replica.

Importing this package or its registry needs neither torch nor Ray; `adapter_rows` and `formats` need torch.
"""
