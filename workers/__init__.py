"""Adapters in motion: the row form, the bank, models and the batching engine. No Ray, no HTTP."""
