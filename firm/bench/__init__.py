"""Critic against held-out reference scores (paper section 3.3; FIRM-Bench), today the teacher's.

In: ``critic`` and ``data``, whose test examples carry the teacher's scores. Out: ``predictions.jsonl``, one
judgement per line, the agreement in the summary, and ``verdict.json``: whether the critic may steer RL.
"""
