"""The report: one self-contained HTML page of a whole run.

In: the artifact of every other stage that ran. Out: ``report.html``. It reads summaries, manifests and the
evaluate stage's samples.
"""
