"""Prompts of a user's file: every format, every slip, a stable split."""

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import Image

from firm.config import PromptsConfig
from firm.images import decode_image, encode_image
from firm.prompts import Splits, load_prompts, with_source
from firm.records import Prompt, UserError

ALL = [f"prompt number {i}" for i in range(200)]


def load(path: Path, split: str = "train", **options: float) -> list[str]:
    return [p.text for p in load_prompts(PromptsConfig(path=str(path), **options), split)]  # type: ignore[arg-type]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\n\n  zwei Hunde \r\na cat\n日本の犬"),
        ("p.txt", b"\xef\xbb\xbfa cat\nzwei Hunde\n" + "日本の犬\n".encode()),
        ("p.jsonl", '{"prompt": "a cat"}\n\n"zwei Hunde"\n{"input_prompt": "日本の犬", "extra": 1}\n'),
        ("p.jsonl", b'\xef\xbb\xbf"a cat"\n"zwei Hunde"\n' + '"日本の犬"'.encode()),
        ("p.json", '[{"input_prompt": "a cat"}, "zwei Hunde", {"prompt": "日本の犬"}, "a cat"]'),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str | bytes) -> None:
    assert load(write(tmp_path, name, text), test_share=0) == ["a cat", "zwei Hunde", "日本の犬"]


def test_what_stands_within_texts_is_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firm.texts.MAX_VALUES", 3)
    texts = ["a cat, a dog, [a bird], {x}", '"one", \\"two\\", three']
    path = write(tmp_path, "p.json", json.dumps(texts))
    assert load(path, test_share=0) == texts
    with pytest.raises(UserError, match=r"more than 3 values \(.*p\.json\)"):
        load(write(tmp_path, "p.json", json.dumps([*texts, "c"])))
    with pytest.raises(UserError, match="more than 3 lines"):
        load(write(tmp_path, "p.txt", "a\n" * 4))


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_only_line_feeds_end_a_json_line(tmp_path: Path, separator: str) -> None:
    prompt = f"a poster{separator}with two lines"
    text = json.dumps(prompt, ensure_ascii=False) + "\n"
    assert load(write(tmp_path, "p.jsonl", text), test_share=0) == [prompt]


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("p.txt", "", "empty"),
        ("p.txt", " \n\n", "empty"),
        ("p.json", "[]", "empty"),
        ("p.txt", b"caf\xe9", "UTF-8"),
        ("p.json", '{"prompt": "x"}', "must hold a list"),
        ("p.json", '["x"', "not valid JSON"),
        ("p.jsonl", '"fine"\n{"prompt": \n', r"not valid JSON.*line 2"),
        ("p.jsonl", '"fine"\n\n{"text": "x"}', r"no prompt here.*line 3"),
        ("p.json", '["fine", {"prompt": " "}]', r"no prompt here.*entry 1"),
        ("p.json", '["fine", 7]', r"no prompt here.*entry 1"),
        ("p.json", '[{"prompt": null}]', r"no prompt here.*entry 0"),
    ],
)
def test_slips_are_named(tmp_path: Path, name: str, text: str | bytes, what: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(UserError, match=what) as caught:
        load(path)
    assert caught.value.exit_code == 2 and str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(UserError, match="cannot read prompts") as caught:
            load(path)
        assert caught.value.exit_code == 2


def test_the_split_is_disjoint_complete_and_survives_edits(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\n".join(ALL))
    train = load(path, test_share=0.2)
    test = load(path, "test", test_share=0.2)
    assert sorted(train + test) == sorted(ALL) and not set(train) & set(test) and 20 < len(test) < 60
    assert train == [p for p in ALL if p in set(train)]  # in the order of the file
    edited = write(tmp_path, "q.txt", "\n".join(["new", *reversed(ALL[50:])]))
    assert set(load(edited, "test", test_share=0.2)) - {"new"} == set(test) & set(ALL[50:])
    assert load(path, test_share=0.2, limit=3) == train[:3]
    assert set(load(path, "test", test_share=0.1)) <= set(test)


def test_a_split_without_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompt falls into the test split of 1"):
        load(write(tmp_path, "p.txt", "one"), "test", test_share=0)


def test_a_function() -> None:
    config = PromptsConfig(function="firm.shapes.generation:prompts", limit=5)
    assert len(load_prompts(config, "test")) == 5 != load_prompts(config, "train")
    for name in ("firm.shapes.generation:absent", "no_such_module:f", "firm.shapes.generation"):
        with pytest.raises(UserError, match="cannot import"):
            load_prompts(PromptsConfig(function=name), "train")


def contradictory(split: str) -> list[str]:
    return ["a red circle", "A red  circle"] if split == "test" else ["a red circle"]


def test_a_function_that_gives_a_prompt_for_both_splits_is_refused() -> None:
    with pytest.raises(UserError, match="for both splits: 'a red circle'|for both splits: 'A red  circle'") as caught:
        Splits(PromptsConfig(function=f"{__name__}:contradictory"))
    assert caught.value.exit_code == 2


def test_a_split_does_not_depend_on_how_a_prompt_is_written() -> None:
    splits = Splits(PromptsConfig(path="unused", test_share=0.5))
    for prompt in ALL:
        assert splits.of(Prompt(text=prompt)) == splits.of(Prompt(text=f" {prompt.upper()}\n".replace(" ", "  ")))
    assert {splits.of(Prompt(text=prompt)) for prompt in ALL} == {"train", "test"}


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_a_source_image_is_part_of_the_prompt(tmp_path: Path, name: str) -> None:
    (tmp_path / "cat.png").write_bytes(b"")
    rows = [{"prompt": "make it red", "source_image": "cat.png"}, {"prompt": "make it red"}]
    path = write(tmp_path, name, json.dumps(rows) if name == "p.json" else "\n".join(map(json.dumps, rows)))
    config = PromptsConfig(path=str(path), test_share=0)
    image = str(tmp_path / "cat.png")
    assert load_prompts(config, "train") == [Prompt(text="make it red", image=image), Prompt(text="make it red")]
    path = write(tmp_path, "q.jsonl", json.dumps({"prompt": "x", "source_image": "dog.png"}))
    with pytest.raises(UserError, match=r"no source image 'dog.png'.*q.jsonl, line 1"):
        load(path)


@given(st.text(), st.none() | st.text())
def test_a_prompt_survives_json_and_a_text_alone_stays_a_text(text: str, image: str | None) -> None:
    prompt = Prompt(text=text, image=image)
    assert Prompt.model_validate_json(prompt.model_dump_json()) == prompt
    assert image is not None or text.startswith("{") or prompt.model_dump() == text
    assert {prompt: 1}[Prompt(text=text, image=image)] == 1 and str(prompt) == text


def test_a_sample_is_judged_behind_its_source_in_its_own_size(tmp_path: Path) -> None:
    sample = encode_image(Image.new("RGB", (8, 8), "blue"))
    assert with_source(Prompt(text="a blue square"), sample) == [sample]
    for size in ((8, 8), (32, 16)):
        path = tmp_path / f"{size[0]}.webp"
        Image.new("RGB", size, "red").save(path, lossless=True)
        source, same = with_source(Prompt(text="paint it blue", image=str(path)), sample)
        assert same == sample and source == encode_image(Image.new("RGB", (8, 8), "red"))
        assert decode_image(source, "").size == (8, 8)


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cannot read an image") as caught:
        with_source(Prompt(text="paint it blue", image=path), encode_image(Image.new("RGB", (8, 8))))
    assert path in str(caught.value)


def edits(split: str) -> list[str | Prompt]:
    return [Prompt(text=f"{split} it", image=f"{i}.png") for i in range(2)] + [f"a {split}"]  # type: ignore[operator]


def test_a_function_may_give_prompts_with_source_images() -> None:
    config = PromptsConfig(function=f"{__name__}:edits")
    found = load_prompts(config, "train")
    assert [(p.text, p.image) for p in found] == [("train it", "0.png"), ("train it", "1.png"), ("a train", None)]
    assert [Splits(config).of(Prompt(text=text)) for text in ("test it", "train it")] == ["test", "train"]
