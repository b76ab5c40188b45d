"""What may be shown on a terminal."""

import re

_UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text that may come from outside; codes that act on a terminal or turn text around are shown, not sent."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
