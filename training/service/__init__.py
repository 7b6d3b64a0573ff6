"""Training as a service: jobs of the HTTP API, from a request to a published adapter. Knows no HTTP and no Ray."""
