"""The journal: nothing is judged twice, whatever happened to the file."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from firm.chat import journal as journals
from firm.chat.journal import Journal, Journals
from firm.chat.messages import ChatMessage, Reply, RequestFailed, Token, user_message
from firm.config import PythonChat
from firm.records import UserError


class Counting:
    """Answers a text with itself and counts."""

    def __init__(self, name: str = "counting") -> None:
        self.name, self.calls = name, 0

    def complete(self, messages: Sequence[ChatMessage], *, seed: int | None, **_options: Any) -> Reply:
        self.calls += 1
        text = messages[0]["content"][-1]["text"]
        if text == "fail":
            raise RequestFailed("no")
        return Reply(f"{text} {seed} \u00e9\n", truncated=text == "long")


def ask(journal: Journal, text: str, seed: int = 0) -> Reply:
    return journal.complete([user_message(text)], max_tokens=9, temperature=0.0, seed=seed)


def test_answers_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    chat = Counting()
    journal = Journal(chat, path)
    first = [ask(journal, t) for t in ("a", "long", "a")]
    assert chat.calls == 2 and len(journal) == 2
    journal.close()
    again = Journal(Counting(), path)
    assert [ask(again, t) for t in ("a", "long", "a")] == first
    assert again._chat.calls == 0  # type: ignore[attr-defined]
    assert ask(again, "a", seed=1).text != first[0].text and ask(again, "b").text == "b 0 \u00e9\n"
    assert ask(again, "b").text == "b 0 \u00e9\n"  # read back from behind what was loaded
    again.close()
    records = [json.loads(line)["record"] for line in path.read_text().splitlines()]
    assert all(set(record) == {"request", "text", "truncated"} for record in records)


class Spelling(Counting):
    """Answers with tokens."""

    def complete(self, *arguments: Any, **options: Any) -> Reply:
        top = ((" 4", -0.5), (" 5", -1.0))
        tokens = (Token("Score:", -0.25, (("Score:", -0.25),)), Token(" 4", -0.5, top), Token("\ud800", -2.0))
        return Reply(super().complete(*arguments, **options).text, tokens=tokens)


def test_tokens_are_remembered_and_what_might_have_stood_for_a_digit(tmp_path: Path) -> None:
    journal = Journal(Spelling(), tmp_path / "j")
    given = ask(journal, "a").tokens
    journal.close()
    again = Journal(Counting(), tmp_path / "j")
    known = ask(again, "a")
    assert again._chat.calls == 0  # type: ignore[attr-defined]
    assert known.tokens == (Token("Score:", -0.25), *given[1:]) and isinstance(known.tokens[1], Token)
    again.close()


class Halves(Counting):
    """Answers with halves of surrogate pairs."""

    def complete(self, *_arguments: Any, **_options: Any) -> Reply:
        return Reply("a \ud800 b", tokens=(Token("4\udfff", -0.5, (("\ud800", -0.5),)),))


def test_whatever_a_chat_says_can_be_written_everywhere(tmp_path: Path) -> None:
    """Halves of surrogate pairs are replaced where they come in, so that no journal gives them back."""
    journal = Journal(Halves(), tmp_path / "j")
    given = ask(journal, "a")
    assert ask(journal, "a") == given and given.text == "a \ufffd b"
    assert given.tokens == (Token("4\ufffd", -0.5, (("\ufffd", -0.5),)),)
    json.dumps([given.text, given.tokens], ensure_ascii=False).encode()
    journal.close()
    with pytest.raises(RequestFailed) as error:
        raise RequestFailed("said \ud800")
    assert error.value.detail == "said \ufffd" == str(error.value)
    assert Reply("\ud83d\ude00").text == "\U0001f600"


@pytest.mark.parametrize("tokens", ["null", "4", '[["4"]]', '[["4", "x"]]', '[["4", -1, [4]]]', "{}"])
def test_damaged_tokens_are_asked_again(tmp_path: Path, tokens: str) -> None:
    journal = Journal(Spelling(), tmp_path / "j")
    ask(journal, "a")
    journal.close()
    line = re.sub(r'"tokens": .*}', f'"tokens": {tokens}}}', (tmp_path / "j").read_text())
    (tmp_path / "j").write_text(line)
    again = Journal(Counting(), tmp_path / "j")
    assert ask(again, "a").tokens == () and again._chat.calls == 1  # type: ignore[attr-defined]
    again.close()


def test_another_judge_does_not_reuse_the_answers(tmp_path: Path) -> None:
    for name in ("one", "two"):
        journal, chat = Journal(chat := Counting(name), tmp_path / "j"), chat
        ask(journal, "a")
        assert chat.calls == 1
        journal.close()


def test_failures_are_not_remembered(tmp_path: Path) -> None:
    chat = Counting()
    journal = Journal(chat, tmp_path / "j")
    for _ in range(2):
        with pytest.raises(RequestFailed):
            ask(journal, "fail")
    assert chat.calls == 2 and len(journal) == 0
    journal.close()


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    journal = Journal(Counting(), path)
    for text in ("a", "b", "c"):
        ask(journal, text)
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    for expected in (1, 0):
        chat = Counting()
        journal = Journal(chat, path)
        assert [ask(journal, t).text[0] for t in ("a", "b", "c")] == ["a", "b", "c"]
        assert chat.calls == expected
        journal.close()


def test_damaged_lines_are_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'\x00\x00\n{"request": "zz", "text": "a", "truncated": false}\n[]\n{"request": "00"}\n')
    journal = Journal(Counting(), path)
    assert len(journal) == 0 and ask(journal, "a").text.startswith("a")
    assert ask(journal, "a").text.startswith("a")
    assert journal._chat.calls == 1  # type: ignore[attr-defined]
    journal.close()


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_no_byte_of_a_journal_can_change_what_was_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever byte is damaged, what is given back was answered, or is asked again and counted."""
    texts = ("score 4", "score 5", "score 2")
    journal = Journal(Spelling(), tmp_path / "whole")
    said = [ask(journal, text).text for text in texts]
    journal.close()
    whole = (tmp_path / "whole").read_bytes()
    for position in (*range(0, len(whole), 7), len(whole) - 1):
        path = tmp_path / str(position)
        path.write_bytes(flipped(whole, position))
        journal = Journal(chat := Counting(), path)
        assert [ask(journal, text).text for text in texts] == said
        torn = position == len(whole) - 1
        assert 1 <= chat.calls <= 2 and 1 - torn <= journal.dropped <= 2
        assert f"{path}: {journal.dropped} damaged records were dropped" in capsys.readouterr().out or torn
        journal.close()


def test_damage_since_a_journal_was_opened_is_seen_and_counted(tmp_path: Path) -> None:
    journal = Journal(chat := Counting(), tmp_path / "j")
    first = ask(journal, "a")
    content = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(content.replace(b"a 0", b"b 0"))
    assert ask(journal, "a") == ask(journal, "a") == first
    assert (chat.calls, journal.dropped, len(journal)) == (2, 1, 1)
    journal.close()


def test_what_was_forgotten_is_asked_again_and_remembered(tmp_path: Path) -> None:
    journal = Journal(chat := Counting(), tmp_path / "j")
    ask(journal, "a")
    journal.forget()
    assert len(journal) == 0 and not (tmp_path / "j").read_bytes()
    for _ in range(2):
        ask(journal, "b")
    assert chat.calls == 2
    journal.close()


@pytest.mark.parametrize("change", [{"max_tokens": 10}, {"temperature": 0.7}, {"seed": 1}])
def test_another_way_of_asking_is_another_question(tmp_path: Path, change: dict[str, Any]) -> None:
    options = {"max_tokens": 9, "temperature": 0.0, "seed": 0}
    journal = Journal(chat := Counting(), tmp_path / "j")
    for asked in (options, options | change):
        journal.complete([user_message("a")], **asked)  # type: ignore[arg-type]
    assert chat.calls == 2
    journal.close()


def test_what_is_answered_while_a_chat_closes_is_kept_and_later_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Counting):
        """Its answers come when it closes."""

        asked, closing = threading.Event(), threading.Event()

        def complete(self, *arguments: Any, **options: Any) -> Reply:
            self.asked.set()
            assert self.closing.wait(10)
            return super().complete(*arguments, **options)

        def close(self) -> None:
            self.closing.set()
            assert replies[0].result(10).text == "a 0 \u00e9\n"

    chat = Slow()
    monkeypatch.setattr(journals, "open_chat", lambda _: chat)
    with ThreadPoolExecutor(1) as threads, Journals(tmp_path) as open_chat:
        journal: Any = open_chat("teacher", PythonChat(target="x:X"))
        replies = [threads.submit(ask, journal, "a")]
        assert chat.asked.wait(10)
    for text in ("a", "b"):
        with pytest.raises(RequestFailed, match="closed"):
            ask(journal, text)
    assert chat.calls == 1
    again = Journal(Counting(), tmp_path / "teacher.jsonl")
    assert len(again) == 1
    again.close()


def test_an_answer_that_comes_after_the_end_is_refused(tmp_path: Path) -> None:
    class Late(Counting):
        def complete(self, *arguments: Any, **options: Any) -> Reply:
            journal.close()
            return super().complete(*arguments, **options)

    journal = Journal(Late(), tmp_path / "j")
    with pytest.raises(RequestFailed, match="closed"):
        ask(journal, "a")


def test_threads(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(Counting(), path)
    texts = [f"text {i % 40}" for i in range(400)]
    with ThreadPoolExecutor(8) as executor:
        replies = list(executor.map(lambda t: ask(journal, t).text, texts))
    assert replies == [f"{t} 0 \u00e9\n" for t in texts] and len(journal) == 40
    journal.close()
    again = Journal(Counting(), path)
    assert [ask(again, t).text for t in texts] == replies
    assert again._chat.calls == 0  # type: ignore[attr-defined]
    again.close()


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    journal = Journal(Counting(), tmp_path / "j")
    with pytest.raises(UserError, match="in use"):
        Journal(Counting(), tmp_path / "j")
    journal.close()
    Journal(Counting(), tmp_path / "j").close()


def test_kill_9_loses_no_answer_that_was_given(tmp_path: Path) -> None:
    code = """
import sys
sys.path.insert(0, sys.argv[2])
from test_journal import Counting, Journal, ask
journal = Journal(Counting(), sys.argv[1])
for i in range(10**6):
    ask(journal, f"text {i}")
    print(i, flush=True)
"""
    path = tmp_path / "j"
    command = [sys.executable, "-c", code, str(path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 50:
            pass
        os.kill(process.pid, signal.SIGKILL)
        given = [51 + i for i, _ in enumerate(process.stdout.read().splitlines())]
    chat = Counting()
    journal = Journal(chat, path)
    for i in [*range(51), *given]:
        assert ask(journal, f"text {i}").text == f"text {i} 0 \u00e9\n"
    assert chat.calls == 0
    journal.close()
