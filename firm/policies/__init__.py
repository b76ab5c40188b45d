"""Policies: one file per model family, the parameter sets that RL keeps, the sampler, and prompts to images with it."""
