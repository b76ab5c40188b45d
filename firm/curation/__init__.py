"""Plan-then-score curation (paper section 3.2).

In: prompts and candidate images (generated, rendered or a user's own). Out: ``judged/`` with every judgement and its
provenance, and ``train/`` and ``test/`` with score-balanced examples that LLaMA-Factory and TRL read.
"""
