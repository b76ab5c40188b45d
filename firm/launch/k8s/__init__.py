"""Training jobs on Kubernetes; no other package knows about Kubernetes."""
