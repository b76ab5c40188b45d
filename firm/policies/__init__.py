"""Policies: one file a model family, the parameter sets that RL keeps, and the sampler."""
