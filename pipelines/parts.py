"""Pipelines of runs that have some of the stages, one for each choice; `firm run` makes its own.

kfp dsl compile --py pipelines/parts.py --function critic --output critic.yaml
"""

from pipelines.full import pipeline_of

critic = pipeline_of(1, ["curation", "sft", "bench", "gate", "report"])
proof = pipeline_of(1, ["bench", "gate", "report"])
served = pipeline_of(1, ["bench", "gate", "rl", "evaluate", "report"])
