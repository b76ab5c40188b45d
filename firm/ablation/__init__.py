"""Ablations: what RL makes of the same policy and critic when one thing is different, here the reward."""
