"""What an operator may watch: our own Prometheus exposition of the ingress and of every replica behind it."""
