"""Where a training job runs on Kubernetes: all that knows of it."""
