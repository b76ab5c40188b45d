"""Whatever an endpoint sends as logprobs, a judgement has a distribution that adds up, or none."""

import json
import math
from typing import Any, Literal

from hypothesis import given
from hypothesis import strategies as st

from firm.chat.completion import read_reply as read_completion
from firm.chat.messages import Reply, Token, valid_unicode
from firm.critics.soft import of_the_lowest, pool, read_reply
from firm.records import Invalid, Judgement

TEXTS = st.sampled_from(["4", " 4", "5", "**4", "Score:", "Final Alignment Rating: ", "\\boxed{", "}", '{"score": [',
                         ", ", "</think>", "\ud800", "\ufffd", "", "12", "nan"])  # fmt: skip
LOGPROBS = st.one_of(st.floats(-30, 0), st.sampled_from([math.nan, math.inf, -math.inf, 5.0, 1e308, -9999.0]))
JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | TEXTS,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=5)  # fmt: skip
ALTERNATIVES = st.fixed_dictionaries({"token": TEXTS | JUNK, "logprob": LOGPROBS | JUNK})
CONTENT = st.fixed_dictionaries(
    {"token": TEXTS, "logprob": LOGPROBS | JUNK}, optional={"top_logprobs": st.lists(ALTERNATIVES, max_size=30) | JUNK}
)
FORMS = st.sampled_from(["boxed", "json"])
STYLES = st.sampled_from(["score_first", "reason_first"])
Form = Literal["boxed", "json"]
Style = Literal["score_first", "reason_first"]


def check(outcome: Judgement | Invalid) -> None:
    if isinstance(outcome, Judgement):
        again = Judgement.model_validate_json(outcome.model_dump_json())  # validates the distribution
        assert again == outcome and 1 <= outcome.soft_score <= 5 + 1e-9


@given(st.lists(CONTENT, max_size=8), st.one_of(st.none(), TEXTS), JUNK, FORMS, STYLES)
def test_hostile_logprobs_never_crash_and_never_become_a_number(
    content: list[dict[str, Any]], other: str | None, junk: Any, form: Form, style: Style
) -> None:
    text = "".join(token["token"] for token in content) if other is None else other
    for logprobs in ({"content": content}, {"content": junk}, junk):
        body = {"choices": [{"message": {"content": text}, "logprobs": logprobs}]}
        reply = read_completion(json.dumps(body).encode())
        assert reply.text == valid_unicode(text) and all(token.logprob <= 1e-3 for token in reply.tokens)
        check(read_reply(reply, form, style))


TOKENS = st.builds(
    Token, TEXTS, LOGPROBS, st.lists(st.tuples(TEXTS, LOGPROBS), max_size=8).map(tuple)  # type: ignore[arg-type]
)  # fmt: skip


@given(st.lists(TOKENS, max_size=8), FORMS, STYLES)
def test_a_judge_in_this_process_is_not_trusted_more(tokens: list[Token], form: Form, style: Style) -> None:
    check(read_reply(Reply("".join(token.text for token in tokens), tokens=tuple(tokens)), form, style))


SIMPLEX = st.tuples(*[st.floats(0, 1)] * 5).filter(lambda d: sum(d) > 0.1).map(lambda d: tuple(p / sum(d) for p in d))


@given(st.lists(SIMPLEX, min_size=1, max_size=3))
def test_the_lowest_is_never_above_any(rows: list[Any]) -> None:
    lowest = of_the_lowest(rows)
    assert math.isclose(sum(lowest), 1, abs_tol=1e-9) and min(lowest) >= 0
    for row in rows:
        assert all(sum(lowest[: i + 1]) >= sum(row[: i + 1]) - 1e-9 for i in range(5))


JUDGEMENTS = st.builds(Judgement, score=st.integers(1, 5), distribution=st.none() | SIMPLEX)
SAMPLES = st.lists(JUDGEMENTS | st.builds(Invalid, reason=st.sampled_from(["empty", "truncated"])), min_size=1)


@given(SAMPLES)
def test_samples_pool_to_their_mean(samples: list[Judgement | Invalid]) -> None:
    pooled = pool(samples)
    check(pooled)
    valid = [sample for sample in samples if isinstance(sample, Judgement)]
    assert isinstance(pooled, Judgement) == (2 * len(valid) >= len(samples))
    if isinstance(pooled, Judgement):
        assert math.isclose(pooled.soft_score, sum(s.soft_score for s in valid) / len(valid), abs_tol=1e-6)
        assert pooled.score in [s.score for s in valid]
