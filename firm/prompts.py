"""Prompts of a run: a user's file or a function, to which split a prompt belongs, and its source image."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import PurePath

from PIL import Image

from firm.config import PromptsConfig
from firm.config.data_path import is_remote
from firm.images import decode_image, encode_image
from firm.locate import load_object
from firm.records import SPLITS, Prompt, Split, UserError
from firm.seeds import seed_for
from firm.storage.given import Given, given
from firm.storage.pictures import read_image
from firm.texts import check_text, parse_json, read_text

_JSONL = (".jsonl", ".ndjson")
_KINDS = (".txt", "", ".json", *_JSONL)
_LINE = "give one JSON value per line"


class Splits:
    """Assigns prompts to splits: the same for prompts, candidates of every source and so the bench.

    Prompts of ``prompts.function`` are where the function puts them, all others where the hash of their text does.
    Case and white space do not count: a held-out prompt in another spelling is held out as well.
    """

    def __init__(self, config: PromptsConfig) -> None:
        """Call the function, if there is one.

        Raises:
            UserError: It fails, or puts a prompt into both splits.
        """
        self._share = config.test_share
        self._given: dict[str, Split] = {}
        for split in SPLITS if config.function is not None else ():
            for prompt in _call(str(config.function), split):
                if self._given.setdefault(_normalised(prompt), split) != split:
                    what = f"{config.function} gives a prompt for both splits: {prompt.text[:200]!r}"
                    raise UserError(what, "prompts.function", "give each prompt for one split only", usage=True)

    def of(self, prompt: Prompt) -> Split:
        """The split of any prompt, whether or not it is one of the run's."""
        text = _normalised(prompt)
        by_hash: Split = "test" if seed_for(0, "split", text) / 2**63 < self._share else "train"
        return self._given.get(text, by_hash)


def _normalised(prompt: Prompt) -> str:
    return " ".join(prompt.text.split()).casefold()


def load_prompts(config: PromptsConfig, split: Split) -> list[Prompt]:
    """Distinct prompts of one split, in the order of their source.

    A file, here, in S3 or on the hub, may be text (one prompt per line), JSONL or a JSON list of strings or of objects
    with ``input_prompt`` or ``prompt`` (the released training files) and, for editing, ``source_image``, a path
    relative to the file. Its prompts are split by the hash of their text, so the split survives edits.

    Raises:
        UserError: There is no file, or it is empty, or holds something else; the line is named.
    """
    if config.function is not None:
        prompts = _call(config.function, split)
    else:
        if config.path is None:
            raise UserError("there are no prompts", "prompts", "give prompts.path or prompts.function", usage=True)
        everything = dict.fromkeys(_read(given(config.path)))
        splits = Splits(config)
        prompts = [p for p in everything if splits.of(p) == split]
        if not prompts:
            what = f"no prompt falls into the {split} split of {len(everything)} prompts"
            raise UserError(what, config.path, "give more prompts or change prompts.test_share", usage=True)
    return prompts[: config.limit]


def with_source(prompt: Prompt, png: bytes) -> list[bytes]:
    """What a judge is shown of a sample: its PNG image, for editing behind its source image, scaled to the same size.

    Raises:
        UserError: The source image cannot be read.
    """
    if prompt.image is None:
        return [png]
    return [_source(prompt.image, decode_image(png, "a sample").size), png]


@lru_cache(maxsize=64)
def _source(source: str, size: tuple[int, int]) -> bytes:
    """A source image as PNG of a size; the samples of a group follow one another."""
    where = source[:200]  # a data URL may be long
    png = read_image(source, where)
    image = decode_image(png, where)
    return png if image.size == size else encode_image(image.resize(size, Image.Resampling.LANCZOS))


def _call(name: str, split: Split) -> list[Prompt]:
    function = load_object(name, "prompts.function")
    fix = "give a function(split) -> list of texts, for editing of firm.records.Prompt with source images"
    try:
        prompts = list(function(split))
    except Exception as error:  # whatever a user's function raises
        what = f"{name}({split!r}) failed: {type(error).__name__}: {error}"
        raise UserError(what, "prompts.function", fix, usage=True) from error
    if not prompts or not all(isinstance(p, str | Prompt) and str(p).strip() for p in prompts):
        raise UserError(f"{name}({split!r}) gives no list of prompts", "prompts.function", fix, usage=True)
    for prompt in prompts:
        check_text(str(prompt), f"prompts.function, {split}")
    return [prompt if isinstance(prompt, Prompt) else Prompt(text=prompt) for prompt in prompts]


def _read(file: Given) -> list[Prompt]:
    kind = PurePath(file.name).suffix.lower()
    if kind not in _KINDS:
        what = f"a prompt file ends in {', '.join(filter(None, _KINDS))} or has no ending, not in {kind}"
        raise UserError(what, file.name, "give text (one prompt per line), JSONL or a JSON list", usage=True)
    text = read_text(file.fetch(), "prompts", "check prompts.path", file.name)
    if kind == ".json":
        rows = parse_json(text, file.name, 'give a list like [{"input_prompt": ...}]')
        if not isinstance(rows, list):
            raise UserError(
                "a JSON prompt file must hold a list", file.name, 'like [{"input_prompt": ...}]', usage=True
            )
        found = [_prompt(row, file, f"entry {i}") for i, row in enumerate(rows)]
    else:
        lines = ((f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        found = [
            _prompt(parse_json(line, f"{file.name}, {place}", _LINE) if kind in _JSONL else line, file, place)
            for place, line in lines
        ]
    if not found:
        raise UserError("the prompt file is empty", file.name, "give at least one prompt per line", usage=True)
    return found


def _prompt(row: object, file: Given, place: str) -> Prompt:
    fields = row if isinstance(row, dict) else {"prompt": row}
    text = fields.get("input_prompt", fields.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        fix = 'give a string or {"input_prompt": "..."}'
        raise UserError("no prompt here", f"{file.name}, {place}", fix, usage=True)
    check_text(text, f"{file.name}, {place}")
    image = fields.get("source_image")
    return Prompt(text=text.strip(), image=None if image is None else _named(image, file, f"{file.name}, {place}"))


def _named(image: object, file: Given, where: str) -> str:
    """The path or URI of a source image; one in S3 or on the hub is looked for when it is read."""
    path = file.beside(image) if isinstance(image, str) else ""
    if not (is_remote(path) or os.path.isfile(path)):
        raise UserError(f"there is no source image {image!r:.200}", where, "correct the path", usage=True)
    return path
