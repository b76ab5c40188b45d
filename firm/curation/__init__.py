"""Curation by difference-first or plan-then-score (paper sections 3.1 and 3.2).

In: prompts and candidate images, for editing with their sources (sampled, rendered or a user's own). Out: ``judged/``
with every judgement and its provenance, and ``train/`` and ``test/`` with score-balanced examples that LLaMA-Factory
and TRL read.
"""
