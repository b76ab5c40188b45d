"""What a request of the chat protocol may hold."""

import json
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firm.chat.protocol import Refused, parse
from firm.critics.pen import Manner, Pen


def request(**options: object) -> bytes:
    return json.dumps({"messages": [{}], **options}).encode()


@given(st.floats() | st.integers() | st.sampled_from([1e-45, 5e-324, 0.009, 10.1, 1e308, 2**2000]))
def test_a_temperature_is_refused_or_gives_numbers(temperature: float) -> None:
    try:
        _, options = parse(request(temperature=temperature), "any")
    except Refused as error:
        assert error.status == 400 and "0 or a number from 0.01 to 10" in error.message
        return
    scores = torch.tensor([[-1e4, 0.0, 88.0]])
    for dtype in (torch.float32, torch.bfloat16):
        pen = Pen([Manner(9, options["temperature"])], torch.device("cpu"))
        assert pen(torch.zeros(1, 0), scores.to(dtype)).isfinite().all()


@pytest.mark.parametrize("temperature", [None, 0, 0.01, 1, 10.0])
def test_a_sensible_temperature_is_taken(temperature: float | None) -> None:
    assert parse(request(temperature=temperature), "any")[1]["temperature"] == float(temperature or 0)


@pytest.mark.parametrize("value", ["[]", "{}", "1e9", '""', "null"])
def test_many_small_values_are_refused_before_they_take_memory(value: str) -> None:
    body = b'{"messages": [%s]}' % ",".join([value] * 3_000_000).encode()
    tracemalloc.start()
    with pytest.raises(Refused, match="more than 100000 values"):
        parse(body, "any")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["model", "stream", "n", "max_tokens", "temperature", "seed", "logprobs"])
def test_a_refusal_is_short_whatever_it_is_about(name: str) -> None:
    for value in ("x" * 2**20, ["x"] * 9999):
        with pytest.raises(Refused) as refused:
            parse(request(**{name: value}), "any")
        assert len(refused.value.message) < 300 and name in refused.value.message


@given(st.binary() | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    with pytest.raises(Refused):
        parse(body, "any")
