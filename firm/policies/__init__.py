"""Policies: one file a model family, the parameter sets that RL keeps, the sampler, and prompts to images with it."""
