"""A user's own prompts and images through curation; what it writes is readable by Hugging Face datasets."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shared import gate, generated, stage_command

from firm.config import PromptsConfig
from firm.config.loading import load_config
from firm.prompts import load_prompts
from firm.records import Example, JudgedCandidate, Judgement
from firm.shapes import generation, teacher
from firm.storage.inputs import read_manifest, read_ref
from firm.storage.shards import iter_shards

OWN = f"""
base: gen-shapes
name: own
prompts: {{path: prompts.json, test_share: 0.3}}
curation:
  shard_size: 16
  batch_size: 8
  test_share: 0.25
  oversample: 2
  sources:
    - {{kind: files, name: mine, path: images/candidates.jsonl}}
    - {json.dumps(generated(16, num_inference_steps=2))}
bench: {{gate: {gate({"metric": "mae", "source": "mine", "at_most": 1})}}}
"""
FILES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder: prompts as they are released with the paper, images of several formats, a configuration."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    prompts = [{"input_prompt": p, "id": i} for i, p in enumerate(generation.prompts("train")[:30])]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    lines = []
    for i in range(FILES):
        prompt, image = generation.candidate(i, 5, "train")
        name = f"{i}.{('png', 'webp')[i % 2]}"
        image.save(folder / "images" / name, lossless=True)
        lines.append(json.dumps({"prompt": prompt, "image": name}))
    (folder / "images" / "candidates.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "own.yaml").write_text(OWN)
    return folder


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    config = load_config(str(folder / "own.yaml")).model_dump(mode="json", exclude_none=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(stage_command("curation", config, {}, "data"), cwd=folder, env=env, check=True, timeout=100)
    path = Path(read_ref(folder / "data").uri)
    assert read_manifest(read_ref(folder / "data")).stage == "curation"
    return path if path.is_absolute() else folder / path


def test_every_own_image_is_judged_against_its_own_prompt(artifact: Path) -> None:
    mine = [j for j in iter_shards(artifact / "judged", JudgedCandidate) if j.source == "mine"]
    expected = {}
    for i in range(FILES):
        prompt, image = generation.candidate(i, 5, "train")
        expected[prompt, image.convert("RGB").tobytes()] = teacher.instruction_following(prompt, image)
    found = {}
    for judged in mine:
        outcome = judged.assessment["instruction_following"]
        assert isinstance(outcome, Judgement)
        found[judged.prompt.text, picture(judged.images[0]).tobytes()] = outcome.score
    assert len(mine) == FILES and found == expected


def picture(png: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(png)).convert("RGB")


def test_own_prompts_are_split_and_sampled(folder: Path, artifact: Path) -> None:
    config = PromptsConfig(path=str(folder / "prompts.json"), test_share=0.3)
    sampled = [j for j in iter_shards(artifact / "judged", JudgedCandidate) if j.source == "base"]
    assert [j.split for j in sampled].count("test") == 4 and len(sampled) == 16
    for split in ("train", "test"):
        allowed = set(load_prompts(config, split))  # type: ignore[arg-type]
        assert {j.prompt for j in sampled if j.split == split} <= allowed
    mine = [j for j in iter_shards(artifact / "judged", JudgedCandidate) if j.source == "mine"]
    prompts = [{j.prompt for j in mine if j.split == split} for split in ("train", "test")]
    assert prompts[1] and not prompts[0] & prompts[1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_examples_load_as_a_dataset(artifact: Path, split: str, tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    files = [str(p) for p in sorted((artifact / split).glob("*.parquet"))]
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    examples = list(iter_shards(artifact / split, Example))
    assert len(data) == len(examples) > 0
    data = data.cast_column("images", datasets.Sequence(datasets.Image()))
    for row, example in zip(data, examples, strict=True):
        assert row["messages"] == [m.model_dump() for m in example.messages]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert all(set(m) == {"role", "content"} for m in row["messages"])
        asked, answered = (m["content"] for m in row["messages"])
        assert asked.count("<image>") == len(row["images"]) == 1 and "<image>" not in answered
        assert row["images"][0].size == (32, 32)
        assert row["images"][0].convert("RGB").tobytes() == picture(example.images[0]).tobytes()
        assert f"{row['score']}" in answered
    counts = [row["id"] for row in data]
    assert max(map(counts.count, counts)) <= (2 if split == "train" else 1)  # curation.oversample
