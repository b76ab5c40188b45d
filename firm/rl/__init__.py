"""DiffusionNFT RL of the policy with the critic's reward (paper sections 3.4 and 4; arXiv 2509.16117).

In: the gate's ``verdict``, and ``critic`` if one was trained. Out: the policy that was chosen at the end (``policy/``),
``metrics.jsonl`` (one line per epoch) and ``audits.jsonl`` (one line per audit, with the values of every image).
"""
