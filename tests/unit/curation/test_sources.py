"""Sources of candidates: a user's files with every slip, functions, generators."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shared import CPU, TINY

from firm.config import (
    CurationConfig,
    FilesSource,
    FunctionSource,
    GeneratedSource,
    JudgedDimension,
    PromptsConfig,
    PythonChat,
)
from firm.curation.sources import Files as FilesOf
from firm.curation.sources import count, open_source
from firm.images import decode_image, encode_image
from firm.policies.policy import Policy, save_policy
from firm.prompts import Splits
from firm.records import SPLITS, Candidate, Prompt, Split, UserError

PROMPTS = PromptsConfig(function="firm.shapes.generation:prompts", test_share=0.3)
DIMENSIONS = {"instruction_following": JudgedDimension(rubric="evaluate")}
TEACHER = PythonChat(target="firm.shapes.teacher:PixelTeacher")
Files = Callable[..., FilesSource]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """files(rows or text): a source of a JSONL file next to the images 0.png ... 9.png."""
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(encode_image(Image.new("RGB", (8, 8), (i * 20, 0, 0))))

    def made(content: list[Any] | str | bytes) -> FilesSource:
        text = "\n".join(map(json.dumps, content)) if isinstance(content, list) else content
        path = tmp_path / "candidates.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return FilesSource(name="mine", path=str(path))

    return made


def rows(*numbers: int) -> list[dict[str, str]]:
    return [{"prompt": f"picture {i}", "image": f"{i}.png"} for i in numbers]


def curation(source: Any, test_share: float = 0.3) -> CurationConfig:
    return CurationConfig(
        planner=TEACHER, evaluator=TEACHER, sources=[source], test_share=test_share, dimensions=DIMENSIONS
    )


def both(config: FilesSource, test_share: float = 0.3) -> tuple[list[Candidate], list[Candidate]]:
    prompts = PROMPTS.model_copy(update={"test_share": test_share})
    source = open_source(config, prompts, 0)
    train, test = (source.make(s, range(count(config, curation(config), prompts, s))) for s in SPLITS)
    return train, test


@pytest.mark.parametrize("test_share", [0.0, 0.1, 0.5, 1.0])
def test_every_file_is_in_one_split(files: Files, test_share: float) -> None:
    train, test = both(files(rows(*range(10))), test_share)
    assert sorted(c.prompt.text for c in train + test) == sorted(f"picture {i}" for i in range(10))
    assert abs(len(test) - 10 * test_share) <= 2 and {c.split for c in test} <= {"test"}
    for c in train + test:
        shade = int(c.prompt.text.split()[1]) * 20
        assert decode_image(c.images[0], "").getpixel((0, 0)) == (shade, 0, 0)


def test_a_prompt_with_several_images_is_in_one_split(files: Files) -> None:
    """Candidates of the test split are on held-out prompts."""
    several = [{"prompt": f"picture {i % 4}", "image": f"{i}.png"} for i in range(10)]
    train, test = both(files(several), 0.5)
    assert not {c.prompt for c in train} & {c.prompt for c in test}


def test_the_same_index_is_the_same_candidate(files: Files) -> None:
    config = files(rows(*range(10)))
    number = count(config, curation(config), PROMPTS, "train")
    whole = open_source(config, PROMPTS, 0).make("train", range(number))
    assert [open_source(config, PROMPTS, 0).make("train", [i])[0] for i in range(number)] == whole


@pytest.mark.parametrize("name", ["absent.png", "../absent.png", "."])
def test_a_missing_image_is_named(files: Files, name: str) -> None:
    config = files([*rows(0, 1), {"prompt": "x", "image": name}])
    with pytest.raises(UserError, match="cannot read an image") as caught:
        both(config, 0)
    assert f"entry 2: {name}" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0"])
def test_a_corrupt_image_is_named(files: Files, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(UserError, match="cannot decode image") as caught:
        both(files([*rows(0), {"prompt": "x", "image": "bad.png"}]), 0)
    assert "entry 1: bad.png" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "x"', '{"prompt": "x"}', '{"image": "1.png"}', "7", "null", '["x", "1.png"]',
     '{"prompt": 7, "image": "1.png"}', '{"prompt": "x", "image": null}', '{"prompt": "x", "image": ["1.png"]}',
     '{"prompt": "", "image": "1.png"}'],
)  # fmt: skip
def test_a_malformed_line_is_named(files: Files, line: str) -> None:
    config = files(f"{json.dumps(rows(0)[0])}\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        both(config, 0)
    assert caught.value.exit_code == 2 and config.path in str(caught.value)
    assert "line 3" in str(caught.value) or "entry 1" in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"), [("", "empty"), ("\n \n", "empty"), (b"\xff\xfe{", "not UTF-8"), (b"\0{", "zero bytes")]
)
def test_an_empty_or_binary_file_is_named(files: Files, content: str | bytes, what: str) -> None:
    config = files(content)
    with pytest.raises(UserError, match=what) as caught:
        open_source(config, PROMPTS, 0)
    assert config.path in str(caught.value)


def test_a_file_with_a_byte_order_mark_and_odd_line_separators(files: Files) -> None:
    line = json.dumps({"prompt": "two\u2028lines", "image": "1.png"}, ensure_ascii=False)
    train, _ = both(files(b"\xef\xbb\xbf" + line.encode()), 0)
    assert train[0].prompt.text == "two\u2028lines"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read candidates"):
        open_source(FilesSource(name="x", path=str(tmp_path / "absent.jsonl")), PROMPTS, 0)


def test_a_function_depends_on_seed_split_and_index() -> None:
    config = FunctionSource(name="rendered", function="firm.shapes.generation:candidate", num_images=20)
    made = open_source(config, PROMPTS, 1).make("train", range(4))
    assert open_source(config, PROMPTS, 1).make("train", [2]) == made[2:3]
    assert open_source(config, PROMPTS, 2).make("train", [2]) != made[2:3]
    assert open_source(config, PROMPTS, 1).make("test", [2])[0].images != made[2].images
    assert [count(config, curation(config), PROMPTS, s) for s in SPLITS] == [14, 6]


def leaky(index: int, seed: int, split: Split) -> tuple[str, Image.Image]:
    return "a picture", Image.new("RGB", (8, 8))


def test_a_function_that_gives_a_held_out_prompt_for_training_is_refused() -> None:
    config = FunctionSource(name="leaky", function=f"{__name__}:leaky", num_images=2)
    belongs = Splits(PROMPTS).of(Prompt(text="a picture"))
    other: Split = "test" if belongs == "train" else "train"
    assert len(open_source(config, PROMPTS, 0).make(belongs, [0])) == 1
    with pytest.raises(UserError, match=f"a prompt of the other split when asked for {other}: 'a picture'") as caught:
        open_source(config, PROMPTS, 0).make(other, [0])
    assert caught.value.exit_code == 2


# ---- edits


def edits(*numbers: int) -> list[dict[str, str]]:
    return [{"prompt": f"edit {i}", "source_image": f"{i}.png", "image": f"{9 - i}.png"} for i in numbers]


def test_an_edit_is_a_pair_of_the_source_and_the_edited_image(files: Files) -> None:
    config = files(edits(*range(10)))
    train, test = both(config, 0.5)
    assert len(train) + len(test) == 10 and test
    for c in train + test:
        i = int(c.prompt.text.split()[1])
        shades = [decode_image(png, "").getpixel((0, 0)) for png in c.images]
        assert shades == [(i * 20, 0, 0), ((9 - i) * 20, 0, 0)]
        assert c.prompt.image == str(Path(config.path).parent / f"{i}.png")


def test_equal_instructions_for_two_sources_are_two_prompts(files: Files) -> None:
    rows = [{"prompt": "make it red", "source_image": f"{i}.png", "image": "9.png"} for i in (1, 2)]
    train, _ = both(files(rows), 0)
    assert len({c.prompt for c in train}) == 2 and len({c.prompt.text for c in train}) == 1


def test_a_source_of_another_size_is_named(files: Files, tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(encode_image(Image.new("RGB", (12, 8))))
    config = files([*edits(0), {"prompt": "x", "source_image": "wide.png", "image": "1.png"}])
    with pytest.raises(UserError, match="source image has 12 x 8 pixels, the edited one 8 x 8") as caught:
        both(config, 0)
    assert "entry 1: 1.png" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("row", "wanted", "words"),
    [
        ({"prompt": "x", "source_image": "absent.png", "image": "1.png"}, 2, "entry 1: absent.png"),
        ({"prompt": "x", "source_image": "1.png", "image": "absent.png"}, 2, "entry 1: absent.png"),
        ({"prompt": "x", "image": "1.png"}, 2, "give each entry a source_image"),
        ({"prompt": "x", "source_image": "1.png", "image": "2.png"}, 1, "leave source_image out"),
    ],
)
def test_a_missing_or_superfluous_source_is_named_before_a_run(
    files: Files, row: dict[str, str], wanted: int, words: str
) -> None:
    first = edits(0) if wanted == 2 else rows(0)
    with pytest.raises(UserError) as caught:
        FilesOf(files([*first, row]), Splits(PROMPTS)).check(wanted)
    assert words in str(caught.value) and "entry 1" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("source", ['""', "7", '["1.png"]'])
def test_a_malformed_source_is_named(files: Files, source: str) -> None:
    with pytest.raises(UserError, match="must be texts, and not empty") as caught:
        both(files(f'{{"prompt": "x", "image": "1.png", "source_image": {source}}}'), 0)
    assert "line 1" in str(caught.value) and "source_image" in str(caught.value)


PAINTED = PromptsConfig(function="edits:prompts")


def test_a_function_may_give_pairs() -> None:
    source = open_source(FunctionSource(name="painted", function="edits:candidate", num_images=9), PAINTED, 0)
    made = source.make("train", range(9))
    assert all(len(c.images) == 2 and c.images[0] != c.images[1] for c in made)
    assert all((c.prompt.image or "").startswith("sha256:") for c in made)
    known = {c.images[0]: c.prompt.image for c in made}
    assert len(set(known.values())) == len(known)  # equal instructions for other images stay apart


def squeezed(index: int, seed: int, split: Split) -> tuple[Prompt, Image.Image, Image.Image]:
    prompt = Prompt(text="paint the first patch red", image="mine.png")
    return prompt, Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8 + index))


def test_a_function_may_name_its_sources_and_must_keep_their_size() -> None:
    source = open_source(FunctionSource(name="x", function=f"{__name__}:squeezed", num_images=2), PAINTED, 0)
    [candidate] = source.make("train", [0])
    assert candidate.prompt.image == "mine.png"
    with pytest.raises(UserError, match="8 x 8 pixels, the edited one 8 x 9") as caught:
        source.make("train", [1])
    assert "squeezed, train 1" in str(caught.value)


def test_a_generator_samples_its_own_prompts_and_mismatches_a_share() -> None:
    plain = GeneratedSource(name="base", policy=TINY, num_images=9, num_inference_steps=2, guidance_scale=2.0)
    source = open_source(plain, PROMPTS, 0)
    made = source.make("train", range(6))
    assert source.make("train", range(6)) == made
    again = open_source(plain, PROMPTS, 1).make("train", range(6))
    assert [c.images for c in again] != [c.images for c in made]
    assert decode_image(made[0].images[0], "").size == (32, 32) and len({c.images[0] for c in made}) == 6
    assert not {c.prompt for c in made} & {c.prompt for c in source.make("test", range(3))}
    wrong = open_source(plain.model_copy(update={"mismatched": 1.0}), PROMPTS, 0).make("train", range(6))
    assert [c.images for c in wrong] == [c.images for c in made]
    assert sum(a.prompt != b.prompt for a, b in zip(wrong, made, strict=True)) >= 5


def test_a_kept_policy_is_sampled_in_further_rounds_only(tmp_path: Path) -> None:
    policy = Policy(TINY, CPU)
    with torch.no_grad():
        for tensor in policy.train(None, (), seed=0).trainable:
            tensor.mul_(1.1)
    save_policy(tmp_path, policy)
    base = GeneratedSource(name="mine", policy=TINY, num_images=4, num_inference_steps=2)
    kept = base.model_copy(update={"policy": "kept"})
    made = open_source(kept, PROMPTS, 0, tmp_path).make("train", range(2))
    other = open_source(base, PROMPTS, 0).make("train", range(2))
    assert [c.prompt for c in made] == [c.prompt for c in other] and made[0].images != other[0].images
    with pytest.raises(UserError, match="no policy was kept before the second round"):
        open_source(kept, PROMPTS, 0)
