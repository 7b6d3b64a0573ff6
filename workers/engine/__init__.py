"""The batching engine: requests in, tokens out. It knows nothing of text, HTTP or Ray."""
