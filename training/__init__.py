"""Adapters being made: data, the multi-adapter trainer, and publishing. Uses workers' row form, not a copy of it."""
