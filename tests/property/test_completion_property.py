"""Whatever an endpoint answers with, there is a judgement, a reason why there is none, or a failed request."""

import json
from typing import Any, get_args

from hypothesis import example, given
from hypothesis import strategies as st

from firm.chat.completion import read_reply as read_completion
from firm.chat.messages import RequestFailed
from firm.critics.answers import ScoreFormat, parse_answer, parse_instruction, parse_plan, parse_report
from firm.critics.soft import read_reply
from firm.records import Invalid, Judgement

KEYS = st.sampled_from(["choices", "message", "content", "text", "finish_reason", "logprobs", "token", "top_logprobs"])
TEXTS = st.text() | st.sampled_from(
    ["\\boxed{4}", "Score: 4", "- Is it red?", "\ud800", '{"score": [4, 4, 4]}', "length"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | TEXTS, inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.fixed_dictionaries({"content": VALUES | st.lists(st.fixed_dictionaries({"text": VALUES}))}) | VALUES
CHOICES = st.fixed_dictionaries({"message": MESSAGES}, optional={"finish_reason": VALUES, "logprobs": VALUES}) | VALUES
COMPLETIONS = st.fixed_dictionaries({"choices": st.lists(CHOICES, min_size=1, max_size=2) | VALUES}) | VALUES


def body(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@given(st.binary() | st.tuples(COMPLETIONS, st.binary(max_size=3)).map(lambda part: body(part[0]) + part[1])
       | COMPLETIONS.map(body) | COMPLETIONS.map(lambda value: json.dumps(value).encode()))  # fmt: skip
@example(b"\xff" * 2**16)
@example(b"[" * 2**16)
@example(b'{"choices": [%s]}' % (b"9" * 5000))
def test_any_answer_is_a_reply_or_a_failed_request(content: bytes) -> None:
    try:
        reply = read_completion(content)
    except RequestFailed as error:
        assert error.retryable and len(error.detail.encode()) < 2000
        return
    outcomes = [parse_answer(reply.text, form, reply.truncated) for form in get_args(ScoreFormat)]
    outcomes += [
        read_reply(reply, form, style) for form in ("boxed", "json") for style in ("score_first", "reason_first")
    ]
    for outcome in outcomes:
        assert type(outcome).model_validate_json(outcome.model_dump_json()) == outcome
        assert isinstance(outcome, Invalid) or (isinstance(outcome, Judgement) and 1 <= outcome.soft_score <= 5)
    for parse in (parse_plan, parse_report, parse_instruction):
        made = parse(reply.text, reply.truncated)
        assert isinstance(made, Invalid) or "".join(made).encode()
