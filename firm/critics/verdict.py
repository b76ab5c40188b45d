r"""The grammar of a verdict: a number that stands alone, where a judge concludes. All formats of answers read it here.

A number is written as 4, 4.0, 4/5 or 4 out of 5. It does not stand alone where its line goes on to another scale
("4 / 10"), to further numbers ("3 or 4", "4 and a half"), or to what it is a mention of ("Score: 5 is for perfect
images"), nor behind a bound or a negation ("less than 5", "I would not give 5"). Who writes so has not decided.
"""

from __future__ import annotations

import re

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NON_FINITE = r"[+-]?(?:nan|inf|infinity)"
_OUT_OF = r"(?:(?:points?|stars?)[ \t]+)?(?:out[ \t]+of|of)\b"
_ON_SCALE = r"on[ \t]+a[ \t]+scale[ \t]+(?:of|from)[ \t]+1[ \t]*(?:to|[-–])"
_CLOSING = r"[*_`\"')\]}$]{0,8}[ \t]*\(?"
OF_FIVE = rf"{_CLOSING}(?:/|{_OUT_OF}|{_ON_SCALE})[ \t]*(?:5|five)\b(?![.,]?[0-9])\)?"
"""Behind a number: it is on the scale that was asked for."""
_WORD = r"(?:one|two|three|four|five|six|seven|eight|nine|ten|(?:a[ \t]+)?(?:half|quarter|bit|little))\b"
_DIGIT = r"[0-9½¼¾⅓⅔]"
_NEXT = rf'(?:{_DIGIT}|\\boxed|\{{\s*"score"|score[ \t]*:)'
_MAYBE = r"(?:(?:maybe|perhaps|possibly|even|rather)[ \t]+)?"
_GOES_ON = re.compile(
    rf"(?:{OF_FIVE})?+{_CLOSING}(?:"
    rf"\.[0-9]|%|percent\b|/|out[ \t]+of\b|(?:points?[ \t]+|stars?[ \t]+)?(?:out[ \t]+)?of[ \t]+{_DIGIT}"
    rf"|on[ \t]+an?[ \t]+(?:scale|{_DIGIT}|ten|hundred)"
    rf"|(?:[-–—~±+&,][ \t]*)?(?:(?:or|to|and|through|plus|point)[ \t]+)?{_MAYBE}{_NEXT}"
    rf"|(?:[-–—,][ \t]*)?(?:or|to|and|through|plus|point)[ \t]+{_MAYBE}{_WORD}"
    rf"|(?:is|are)[ \t]+(?:only[ \t]+|reserved[ \t]+|meant[ \t]+)?for\b"
    rf"|(?:would|could|should|might|may|means|if|when)\b"
    rf")",
    re.IGNORECASE,
)
_COMES_FROM = re.compile(
    rf"(?:{_DIGIT}{_CLOSING}(?:[-–~±/]|\b(?:or|to|and|through|plus)\b)[ \t]*{_MAYBE}"
    r"|\b(?:less|more|lower|higher|greater|rather|other)[ \t]+than[ \t]+(?:an?[ \t]+)?"
    r"|\b(?:instead[ \t]+of|at[ \t]+least|at[ \t]+most|almost|nearly|below|above|up[ \t]+to)[ \t]+(?:an?[ \t]+)?"
    r"|(?:\b(?:not|never|cannot|nor)\b|n['’]t\b)[^.:;,!?\n]{0,60}"
    r"|[<>≤≥~≈]"
    r")[ \t*_`$(]{0,8}\Z",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:\A|\n|[.!?][\"'*_)]{0,4}\s)[\s*_#`>$({-]{0,16}"
    r"(?:(?:so|thus|hence|therefore|overall|finally)\b,?\s{1,4})?(?:(?:the|my)\s{1,4})?(?:(?:final|overall)\s{1,4})?"
    r"(?:(?:verdict|answer|score|rating|result|grade)\b(?:\s{1,4}is\b)?[\s*_]{0,4}:?)?[\s*_`$(]{0,8}\Z",
    re.IGNORECASE,
)
_REST_OF_LINE = re.compile(r"[ \t*_`\"'.,;:!()\]}$]{0,16}(?:\n|\Z)")
_NUMERAL = re.compile(rf"({NUMBER}|{_NON_FINITE})(?:{OF_FIVE})?", re.IGNORECASE)
_NEARBY = 120  # characters before a number that say what it is


def number(token: str) -> float | None:
    """A number as above, in markup or with punctuation behind it, or nan or inf; None for anything else."""
    token = token.strip().strip("*_`\"'").rstrip(".,;:!)").strip("*_`\"'").strip()
    match = _NUMERAL.fullmatch(token)
    return float(match[1]) if match else None


def stands_alone(text: str, start: int, end: int) -> bool:
    """Whether the verdict text[start:end] says one number, as far as its line goes."""
    over = text[start:end].rstrip("*_`\"'").endswith((".", "!", ";", ":"))  # the sentence ends with the number
    return not (_COMES_FROM.search(text, max(0, start - _NEARBY), start) or (not over and _GOES_ON.match(text, end)))


def leads(text: str, start: int) -> bool:
    """Whether what stands there begins a line or a sentence, perhaps with "The final score is"."""
    return bool(_LEAD.search(text[max(0, start - _NEARBY) : start] if start else ""))


def ends_line(text: str, end: int) -> bool:
    """Whether nothing but markup and punctuation follows in its line."""
    return bool(_REST_OF_LINE.match(text, end))
