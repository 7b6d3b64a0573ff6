"""The doors: the Ray Serve application, its OpenAI-shaped ingress, its router and its engine replicas."""
