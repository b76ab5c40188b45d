"""Critic SFT (paper section 4).

In: ``data``, the curated examples. Out: the trained critic as a model folder (``critic/``), ready for
``from_pretrained`` and for serving, and the training curve.
"""
