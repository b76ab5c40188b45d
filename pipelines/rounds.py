"""Pipelines of several rounds, one for each value of ``rounds``; `firm run` makes its own.

kfp dsl compile --py pipelines/rounds.py --function two --output two.yaml
"""

from pipelines.full import pipeline_of

two = pipeline_of(2)
three = pipeline_of(3)
