"""Critic, and the auditor beside it, against reference scores: people's or the teacher's (paper section 3.3).

In: ``critic``, if one was trained; ``data``, if it was curated, whose test examples carry the teacher's scores; in a
further round ``last_policy``, from which RL starts. Out: ``critic.jsonl`` and ``auditor.jsonl``, a prediction a line,
``judged`` (the policy's own images with the teacher's scores), the agreement in the summary, and ``verdict.json``:
whether the critic may steer RL.
"""
