"""Judges and the critic: rubrics, parsing of answers, and judging in this process or behind an endpoint."""
