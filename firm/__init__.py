"""FIRM: trustworthy critics for reinforcement learning of image generators and editors (arXiv 2603.12247)."""

__version__ = "0.1.0"
