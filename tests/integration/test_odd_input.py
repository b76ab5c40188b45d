"""Odd bytes in the user's files and configuration: each ends before anything starts, with one message that names it."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from integration.slips import Case, Result, complains, run, stages, write
from integration.test_bad_input import FILES, PROMPTS, SCORES, SMALL
from PIL import Image
from shared import HTTPRequest, serving

from firm.images import decode_image, encode_image
from firm.records import JudgedCandidate
from firm.shapes import generation
from firm.storage.pictures import open_image
from firm.storage.shards import iter_shards
from firm.texts import MAX_BYTES, MAX_VALUES

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
DEEP = "[" * 100_000
LONG = "9" * 5000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
ROW = '{"prompt": "a", "image": "%s"}'
SCORED = '{"prompt": "p", "image": "%s", "scores": {"quality": 4}}'


def png(width: int, height: int) -> bytes:
    return encode_image(Image.new("RGB", (width, height)))


def head(width: int, height: int) -> bytes:
    """The start of a PNG: its pixels are not there."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\x09IDAT"


CASES: dict[str, Case] = {  # files to write, assignments, what the message must name
    "JSONL in capitals": ({"P.JSONL": '"a"\n{"text": 1}'}, [PROMPTS % "P.JSONL"], ["P.JSONL, line 2", "no prompt"]),
    "JSON in capitals": ({"P.Json": '{"a": 1}'}, [PROMPTS % "P.Json"], ["P.Json", "list"]),
    "UTF-16": ({"p.txt": "a cat\n".encode("utf-16")}, [PROMPTS % "p.txt"], ["p.txt", "UTF-8"]),
    "UTF-16 without a mark": ({"p.txt": "a cat\n".encode("utf-16-le")}, [PROMPTS % "p.txt"], ["p.txt", "UTF-8"]),
    "UTF-32": ({"p.jsonl": '"a"\n'.encode("utf-32-be")}, [PROMPTS % "p.jsonl"], ["p.jsonl", "UTF-8"]),
    "CSV": ({"p.csv": "prompt,id\na cat,1\n"}, [PROMPTS % "p.csv"], ["p.csv", ".jsonl", "not in .csv"]),
    "a table": ({"p.TSV": "Prompt\tCategory\n"}, [PROMPTS % "p.TSV"], ["p.TSV", "not in .tsv"]),
    "YAML as prompts": ({"p.yaml": "- a\n"}, [PROMPTS % "p.yaml"], ["p.yaml", "one prompt per line"]),
    "compressed prompts": ({"p.jsonl.gz": b"\x1f\x8b"}, [PROMPTS % "p.jsonl.gz"], ["p.jsonl.gz"]),
    "deep prompts": ({"p.json": DEEP}, [PROMPTS % "p.json"], ["p.json", "nested too deeply"]),
    "a deep line": ({"p.jsonl": f'"a"\n{DEEP}'}, [PROMPTS % "p.jsonl"], ["p.jsonl, line 2", "nested too deeply"]),
    "a long number": (
        {"p.jsonl": f'{{"prompt": "a", "id": {LONG}}}'},
        [PROMPTS % "p.jsonl"],
        ["p.jsonl, line 1", "digits"],
    ),
    "half a pair in a prompt": ({"p.jsonl": '"a \\ud800"'}, [PROMPTS % "p.jsonl"], ["p.jsonl, line 1", "\\ud800"]),
    "zero in a prompt": ({"p.jsonl": '"a \\u0000"'}, [PROMPTS % "p.jsonl"], ["p.jsonl, line 1", "\\x00"]),
    "colors in a prompt": ({"p.txt": "a \x1b[31mred cat"}, [PROMPTS % "p.txt"], ["p.txt, line 1", "\\x1b"]),
    "one endless prompt": ({"p.txt": "a" * 100_000}, [PROMPTS % "p.txt"], ["p.txt, line 1", "100000 characters"]),
    "zero in a source image": (
        {"p.jsonl": '{"prompt": "a", "source_image": "a\\u0000.png"}'},
        [PROMPTS % "p.jsonl"],
        ["p.jsonl, line 1", "a\\x00.png"],
    ),
    "a folder of prompts": ({}, [PROMPTS % "other"], ["other", "folder"]),
    "a device of prompts": ({}, [PROMPTS % "/dev/zero"], ["/dev/zero", "device"]),
    "zero in a path": ({}, ['prompts={path: "a\\0b.txt"}'], ["--set prompts", "\\x00"]),
    "half a pair in a path": ({}, ['prompts={path: "\\ud800.txt"}'], ["--set prompts", "\\ud800"]),
    "zero in a model": ({}, ['critic.model="./a\\0"'], ["--set critic.model", "\\x00"]),
    "zero in the store": ({}, ['store="a\\0"'], ["--set store", "\\x00"]),
    "deep candidates": ({"mine.jsonl": DEEP}, [FILES], ["mine.jsonl, line 1", "nested too deeply"]),
    "a long number of a candidate": ({"mine.jsonl": LONG}, [FILES], ["mine.jsonl, line 1", "digits"]),
    "half a pair in a candidate": ({"mine.jsonl": ROW % "\\udfff"}, [FILES], ["mine.jsonl, line 1", "\\udfff"]),
    "zero in a candidate's image": ({"mine.jsonl": ROW % "\\u0000"}, [FILES], ["mine.jsonl, line 1", "\\x00"]),
    "a thin candidate": (
        {"mine.jsonl": ROW % "a.png", "a.png": png(1, 300)},
        [FILES],
        ["mine.jsonl, entry 0: a.png", "1 x 300", "images.max_aspect"],
    ),
    "a large candidate": (
        {"mine.jsonl": ROW % "a.png", "a.png": head(13_000, 13_000)},
        [FILES],
        ["mine.jsonl, entry 0: a.png", "13000 x 13000", "images.max_pixels"],
    ),
    "a candidate above one's own limit": (
        {"mine.jsonl": ROW % "a.png", "a.png": png(20, 20)},
        [FILES, "images.max_pixels=399"],
        ["a.png", "20 x 20", "399"],
    ),
    "a candidate of another format": (
        {"mine.jsonl": ROW % "a.png", "a.png": b"BM"},
        [FILES],
        ["a.png", "no PNG, JPEG or WebP"],
    ),
    "deep scores": ({"scores.jsonl": DEEP}, [SCORES], ["scores.jsonl, line 1", "nested too deeply"]),
    "an endless line of scores": ({"scores.jsonl": b"\0" * 2**21}, [SCORES], ["scores.jsonl, line 1", "characters"]),
    "a long number of a score": ({"scores.jsonl": f'{{"x": {LONG}}}'}, [SCORES], ["scores.jsonl, line 1", "digits"]),
    "half a pair in scores": ({"scores.jsonl": SCORED % "\\ud800"}, [SCORES], ["scores.jsonl, line 1"]),
    "zero in a scored image": ({"scores.jsonl": SCORED % "\\u0000"}, [SCORES], ["scores.jsonl, line 1", "\\x00"]),
    "a thin scored image": (
        {"scores.jsonl": SCORED % "a.png", "a.png": png(300, 1)},
        [SCORES],
        ["scores.jsonl, line 1: a.png", "300 x 1", "images.max_aspect"],
    ),
    "a deep configuration": ({"small.yaml": "name: " + DEEP}, [], ["small.yaml", "not valid YAML"]),
    "a deep value": ({}, ["name=" + DEEP], ["--set name", "not valid YAML"]),
    "nested configuration": ({"small.yaml": "name: " + "[" * 200 + "]" * 200}, [], ["small.yaml", "50 levels"]),
    "a bomb of aliases": ({"small.yaml": BOMB}, [], ["small.yaml", "20000 values"]),
    "a bomb of aliases in a value": ({}, [f"rl={yaml.safe_load(json.dumps(BOMB))}"], ["--set rl", "20000 values"]),
    "a bomb of merges": ({"small.yaml": MERGES}, [], ["small.yaml", "20000 values"]),
    "a bomb of merges in a value": ({}, [f"rl={{{', '.join(MERGES.splitlines())}}}"], ["--set rl", "20000 values"]),
    "a long configuration": ({"small.yaml": "name: [" + "[]," * 50_000 + "]"}, [], ["small.yaml", "131072"]),
    "an alias of itself": ({"small.yaml": "a: &a [*a]"}, [], ["small.yaml", "50 levels"]),
    "a long number in YAML": ({"small.yaml": f"seed: {LONG}"}, [], ["small.yaml", "digits"]),
    "a long number as value": ({}, [f"seed={LONG}"], ["--set seed", "digits"]),
    "a tag without a value": ({}, ["seed=!!int ''"], ["--set seed", "not valid YAML"]),
    "a date that is none": ({}, ["seed=2024-99-99"], ["--set seed", "not valid YAML"]),
    "an object of Python": ({}, ["name=!!python/object/apply:os.system [id]"], ["--set name", "not valid YAML"]),
    "a password": (
        {},
        ["curation.evaluator={kind: endpoint, base_url: 'http://me:hunter2@host/v1', model: m}"],
        ["curation.evaluator", "base_url", "api_key_env"],
    ),
    "a password of a store": ({}, ["store=s3://me:hunter2@bucket/x"], ["store", "AWS_ACCESS_KEY_ID"]),
    "a source image of a long name": (
        {"p.jsonl": '{"prompt": "a cat", "source_image": "%s"}' % ("x" * 5000)},
        [PROMPTS % "p.jsonl"],
        ["p.jsonl, line 1", "no source image"],
    ),
    "a key in a query": (
        {},
        ["curation.evaluator={kind: endpoint, base_url: 'http://host/v1?key=hunter2', model: m}"],
        ["curation.evaluator", "base_url", "api_key_env"],
    ),
    "a home of nobody": ({}, ["critic.model=~nobody-here/x"], ["critic.model", "~nobody-here/x"]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "other").mkdir()
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_it_is_named_before_anything_starts(folder: Path, here: Callable[..., Result], case: str) -> None:
    files, assignments, words = CASES[case]
    write(folder, files)
    result = here(*run("small.yaml", *assignments))
    complains(result, 2, *words)
    assert "hunter2" not in result.stderr and len(result.stderr) < 2000
    assert not (folder / "runs").exists()


def test_a_sparse_image_is_refused_by_its_size(folder: Path, here: Callable[..., Result]) -> None:
    write(folder, {"mine.jsonl": ROW % "a.webp", "a.webp": b"RIFF\xff\xff\xff\x7fWEBPVP8 "})
    os.truncate(folder / "a.webp", 40 * 10**9)
    complains(here(*run("small.yaml", FILES)), 2, "mine.jsonl, entry 0: a.webp", "40000000000 bytes")


def test_what_a_server_says_does_not_act_on_the_terminal(folder: Path, here: Callable[..., Result]) -> None:
    def painting(request: HTTPRequest) -> None:
        request.reply(400, "\x1b[31m\x1b]0;owned\x07\u202eevil\x9b2J".encode())

    with serving(painting) as url:
        endpoint = f"critic.endpoint={{kind: endpoint, base_url: '{url}/v1', model: m}}"
        rubrics = "critic.rubrics={instruction_following: short_instruction_following, quality: short_quality}"
        result = here(*run("small.yaml", "critic.kind=endpoint", endpoint, rubrics))
    complains(result, 1, "critic.endpoint", "\\x1b[31m", "\\x07", "\\u202e", "evil")
    assert not set("\x1b\x07\x9b\u202e") & set(result.stderr + result.stdout)


# ---- any bytes -------------------------------------------------------------------------------------------------------

BYTES = (
    st.binary(max_size=300)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.recursive(st.none() | st.text(max_size=9) | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["prompt", "input_prompt", "source_image", "image", "x"]), inner), max_leaves=9
    ).map(lambda value: json.dumps(value).encode())
)  # fmt: skip
ENDS_AT_THE_STORE = "store=/proc/firm"  # where nothing can be written: what is not refused ends here, with exit code 1


@FEW
@given(content=BYTES, name=st.sampled_from(["p.txt", "p", "p.json", "p.jsonl", "p.NDJSON", "p.csv"]))
@example(content=b"\xff\xfea\0", name="p.txt")
@example(content=b"[" * 100_000, name="p.json")
@example(content=b'"\\ud800"', name="p.jsonl")
def test_any_bytes_as_prompts(folder: Path, here: Callable[..., Result], content: bytes, name: str) -> None:
    write(folder, {name: content})
    result = here(*run("small.yaml", PROMPTS % name, ENDS_AT_THE_STORE))
    if result.returncode == 1:
        complains(result, 1, "/proc/firm")
    else:
        complains(result, 2)
        assert name in result.stderr or "prompt" in result.stderr


@FEW
@given(content=BYTES)
def test_any_bytes_as_candidates_and_scores(folder: Path, here: Callable[..., Result], content: bytes) -> None:
    for name, source in (("mine.jsonl", FILES), ("scores.jsonl", SCORES)):
        write(folder, {name: content})
        complains(here(*run("small.yaml", source)), 2, name)


@FEW
@given(content=BYTES | st.text(alphabet="&*a[]{}:,-!<>|'\"\\ \n0x", max_size=60).map(str.encode))
def test_any_bytes_as_configuration(folder: Path, here: Callable[..., Result], content: bytes) -> None:
    write(folder, {"any.yaml": content})
    complains(here("run", "any.yaml"), 2, "any.yaml")


PIECES = st.sampled_from(["[],", "{},", "[[[[[]]]]],", '"ab",', '{"a":1},', "\n", "a\n", "1", "- a\n", "\U0001f600"])
NAMED = {name: PROMPTS % name for name in ("p.txt", "p.json", "p.jsonl")} | {
    "mine.jsonl": FILES,
    "scores.jsonl": SCORES,
}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(piece=PIECES | st.text(min_size=1, max_size=9), name=st.sampled_from([*NAMED, "any.yaml"]))
@example(piece="[[[[[]]]]],", name="p.json")
@example(piece="a\n", name="p.txt")
@example(piece="[],", name="any.yaml")
def test_any_text_over_and_over(folder: Path, here: Callable[..., Result], piece: str, name: str) -> None:
    """Files as large as any may be; `here` bounds the memory."""
    content = piece.encode("utf-8", "surrogatepass")
    write(folder, {name: b"[" * name.endswith("json") + content * (MAX_BYTES // len(content) - 1)})
    words = run("small.yaml", NAMED[name]) if name in NAMED else run(name)
    complains(here(*words), 2, name)


@pytest.mark.slow
def test_as_many_prompts_as_there_may_be(folder: Path, here: Callable[..., Result]) -> None:
    """One character that takes four bytes makes a text in memory four times as large as its file."""
    digits = MAX_BYTES // MAX_VALUES - len('"\U0001f600 "\n'.encode())
    write(folder, {"p.jsonl": "".join(f'"\U0001f600 {i:0{digits}}"\n' for i in range(MAX_VALUES))})
    assert (folder / "p.jsonl").stat().st_size == MAX_BYTES
    complains(here(*run("small.yaml", PROMPTS % "p.jsonl", ENDS_AT_THE_STORE)), 1, "/proc/firm")


KEYS = [
    "seed",
    "name",
    "store",
    "rl.max_epochs",
    "curation.sources",
    "curation.sources.0.name",
    "policy.model",
    "critic.model",
    "prompts.path",
    "bench.gate.rules",
    "images.max_pixels",
    "images",
    "rounds",
    "further_rounds",
]


@FEW
@given(key=st.sampled_from(KEYS), value=st.text(max_size=30) | st.text(alphabet="&*a[]{}:,-!~0.9e'\" \n", max_size=30))
def test_any_text_as_a_value(folder: Path, here: Callable[..., Result], key: str, value: str) -> None:
    result = here("config", "show", "small.yaml", "--set", f"{key}={value}")
    if result.returncode:
        complains(result, 2)


# ---- odd images that are fine ----------------------------------------------------------------------------------------


def odd_images() -> dict[str, tuple[Image.Image, dict[str, object]]]:
    """Name of a file -> what is saved, and how."""
    noise = Image.effect_noise((24, 16), 90)
    turned = Image.Exif()
    turned[0x0112] = 6
    values = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
    clear = Image.merge("RGBA", [*Image.merge("RGB", [noise] * 3).split(), noise.point(lambda v: 255 - v)])
    return {
        "turned.jpg": (noise, {"exif": turned}),
        "turned.webp": (noise.convert("RGB"), {"exif": turned, "lossless": True}),
        "deep.png": (Image.fromarray(values), {}),
        "clear.png": (clear, {}),
        "clear.webp": (clear, {"lossless": True}),
        "gray-clear.png": (Image.merge("LA", [noise, noise]), {}),
        "palette.png": (noise.convert("P"), {"transparency": 3}),
        "print.jpg": (noise.convert("CMYK"), {}),
        "bits.png": (noise.convert("1"), {}),
        "dot.png": (Image.new("RGB", (1, 1)), {}),
        "line.png": (Image.new("RGB", (1, 16)), {}),
        "profile.png": (noise, {"icc_profile": b"no profile"}),
    }


def test_odd_images_are_judged_as_they_are_seen(folder: Path) -> None:
    made = odd_images()
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    names = [*made] * 4  # enough for both splits
    rows = [{"prompt": p, "image": n} for p, n in zip(generation.prompts("train"), names, strict=False)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "p.txt").write_text("\n".join(str(row["prompt"]) for row in rows))
    result = stages(folder, "curation", FILES, "prompts={path: p.txt, test_share: 0.3}", timeout=200)
    assert result.returncode == 0, result.stderr
    shown = {row["prompt"]: open_image(folder / row["image"], "").tobytes() for row in rows}
    [data] = (folder / "runs" / "small").glob("curation-*/judged")
    judged = {j.prompt.text: decode_image(j.images[0], "").tobytes() for j in iter_shards(data, JudgedCandidate)}
    assert judged == shown and len(shown) == len(rows) >= 2 * len(made)
