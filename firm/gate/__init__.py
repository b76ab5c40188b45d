"""Trust your critic, enforced: a critic that fails the bench's rules ends the run here, before RL.

In: ``bench``. Out: ``verdict.json``, without which rl does not start.
"""
