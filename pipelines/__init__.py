"""Kubeflow Pipelines definitions: thin, the same on a laptop and on a cluster."""
