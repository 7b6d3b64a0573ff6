"""`flora demo`: the whole story on one machine, with real parts: train, publish, serve, ask, compare, judge."""
