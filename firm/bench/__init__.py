"""Critic against human scores (paper section 3.3; FIRM-Bench).

In: ``critic`` and ``data``, whose test examples carry human (or teacher) scores. Out: ``predictions.jsonl``, one
judgement per line, the agreement in the summary, and ``verdict.json``: whether the critic may steer RL.
"""
