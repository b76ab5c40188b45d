"""Evaluation on held-out prompts before and after RL, with the same seeds (paper section 5).

In: ``critic`` and ``policy``. Out: ``samples/``, every image with the judgements of critic and auditor, and mean scores
with confidence intervals in the summary.
"""
