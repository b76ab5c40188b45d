"""Critic and auditor against people's or the teacher's scores (paper section 3.3; FIRM-Bench).

In: ``critic``; ``data``, whose test examples carry the teacher's scores; perhaps ``policy``, from which RL starts. Out:
``critic.jsonl`` and ``auditor.jsonl``, a prediction a line, ``judged`` (the policy's own images with the teacher's
scores), the agreement in the summary, and ``verdict.json``: whether the critic may steer RL.
"""
