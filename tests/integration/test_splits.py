"""One file of 2,000 prompts through everything that uses prompts: no prompt is in two splits."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from shared import generated

from firm.config import RunConfig
from firm.config.loading import load_config
from firm.curation.run import run as curate
from firm.curation.sources import Generated
from firm.evaluate.held_out import HeldOut
from firm.images import encode_image
from firm.prompts import load_prompts
from firm.records import SPLITS, Example, JudgedCandidate, Split
from firm.storage.artifacts import Output
from firm.storage.shards import iter_shards

ALL = [f"prompt number {i}" for i in range(2000)]


class Judge:
    """Answers at once, as 2,000 images are judged."""

    def complete(self, messages: Sequence[Any], **_: Any) -> str:
        has_image = any(part["type"] == "image_url" for part in messages[0]["content"])
        return "\\boxed{3}" if has_image else "- [ ] Is it there?"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Prompts in a file; images of all of them in another, in another order and partly written otherwise."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "prompts.txt").write_text("\n".join(ALL))
    (folder / "one.png").write_bytes(encode_image(Image.new("RGB", (8, 8))))
    rows = [{"prompt": p.upper() + " " if i % 3 else p, "image": "one.png"} for i, p in enumerate(reversed(ALL))]
    (folder / "candidates.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judge = f"{{kind: python, target: '{__name__}:Judge'}}"
    sampled = json.dumps(generated(1, num_inference_steps=1))
    (folder / "run.yaml").write_text(
        f"""
base: gen-shapes
prompts: {{path: {folder}/prompts.txt, test_share: 0.12}}
curation:
  planner: {judge}
  evaluator: {judge}
  dimensions: {{instruction_following: {{rubric: evaluate}}}}
  sources: [{{kind: files, name: mine, path: {folder}/candidates.jsonl}}, {sampled}]
critic: {{rubrics: {{instruction_following: short_instruction_following}}}}
reward: {{formula: base_only}}
evaluate: {{num_images: 500}}
"""
    )
    return load_config(str(folder / "run.yaml"))


def test_no_prompt_is_in_two_splits(config: RunConfig, tmp_path: Path) -> None:
    files_only = config.curation.model_copy(update={"sources": config.curation.sources[:1]})
    out = Output.open(str(tmp_path / "curated"))
    curate(config.model_copy(update={"curation": files_only}), {}, out)
    judged = list(iter_shards(out.folder / "judged", JudgedCandidate))
    drawn = Generated(config.curation.sources[1], config.prompts, config.seed)  # type: ignore[arg-type]
    seen: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        uses = {
            "RL or evaluation": [p.text for p in load_prompts(config.prompts, split)],
            "images of files": [j.prompt.text for j in judged if j.split == split],
            "examples of critic or bench": [e.prompt.text for e in iter_shards(out.folder / split, Example)],
            "sampled images": [p.text for i in range(500) for p in drawn._draw(split, i)],
        }
        for use, prompts in uses.items():
            assert prompts, f"{use}: nothing in {split}"
            seen[split] |= {" ".join(p.split()).lower() for p in prompts}
    evaluated = HeldOut.prompts(SimpleNamespace(config=config))  # type: ignore[arg-type]  # needs no critic
    seen["test"] |= {p.text for p in evaluated}
    assert not seen["train"] & seen["test"]
    assert len(seen["train"]) + len(seen["test"]) == len(ALL) and 180 < len(seen["test"]) < 300
