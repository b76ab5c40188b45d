"""The report: one self-contained HTML page of a whole run.

In: every other stage's artifact. Out: ``report.html``. It reads summaries, manifests and the evaluate stage's samples.
"""
