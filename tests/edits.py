"""A world of edits for tests: pictures of four patches, instructions to paint one, and a teacher that sees pixels."""

import base64
import json
import random
import re
from typing import Any

import numpy as np
from PIL import Image

from firm.config.loading import load_config
from firm.images import decode_image, encode_image
from firm.records import Prompt

COLOURS = {"red": (200, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 220), "white": (250, 250, 250)}
NAMES = list(COLOURS)
PATCHES = ("first", "second", "third", "fourth")
SIDE = 8
TEACHER = {"kind": "python", "target": "edits:Teacher"}
DIMENSIONS = {"execution": "evaluate_execution", "consistency": "evaluate_consistency"}
SHORT = {d: f"short_{d}" for d in DIMENSIONS}


def picture(*colours: str) -> Image.Image:
    """Four stripes from left to right, which make a square."""
    pixels = np.repeat(np.array([[COLOURS[c] for c in colours]], dtype=np.uint8), SIDE, 1)
    return Image.fromarray(np.repeat(pixels, SIDE * len(colours), 0))


def colours(png: bytes) -> list[str]:
    pixels = np.asarray(decode_image(png, "an edit")).astype(int)
    middles = pixels[SIDE // 2, SIDE // 2 :: SIDE]
    return [min(NAMES, key=lambda name: abs(middle - COLOURS[name]).sum()) for middle in middles]


def instructions(split: str) -> list[str]:
    """Every instruction is known; the split goes by the colour's name: only white is held out."""
    held_out = split == "test"
    return [f"paint the {p} patch {c}" for p in PATCHES for c in NAMES if (c == "white") == held_out]


def prompts(split: str) -> list[Prompt]:
    """Each instruction with a source image in which there is something to do."""
    return [Prompt(text=text, image=data_url(perfect(text, random.Random(text))[0])) for text in instructions(split)]


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_image(image)).decode()


def perfect(asked: str, draw: random.Random) -> tuple[Image.Image, Image.Image]:
    """A source image and its perfect edit."""
    _, _, patch, _, colour = asked.split()
    before = [draw.choice([n for n in NAMES if n != colour]) for _ in PATCHES]
    return picture(*before), picture(*[colour if p == patch else b for p, b in zip(PATCHES, before, strict=True)])


def candidate(index: int, seed: int, split: str) -> tuple[str, Image.Image, Image.Image]:
    """An instruction of the split with a source and the perfect edit."""
    draw = random.Random(f"{index} {seed} {split}")
    asked = draw.choice(instructions(split))
    return asked, *perfect(asked, draw)


def scores(instruction: str, before: list[str], after: list[str]) -> dict[str, int]:
    """Execution: painted as asked 5, in another colour 3, not at all 1. Consistency: 2 less for any other change."""
    _, _, patch, _, colour = instruction.split()
    target = PATCHES.index(patch)
    changed = [i for i in range(4) if before[i] != after[i]]
    execution = 5 if after[target] == colour else 3 if target in changed else 1
    return {"execution": execution, "consistency": max(1, 5 - 2 * len([i for i in changed if i != target]))}


class Teacher:
    """Answers every template of editing; the class attributes are for tests that want it to fail."""

    reporting = True
    rewriting = True

    def complete(self, messages: list[dict[str, Any]], *, max_tokens: int, temperature: float, seed: int | None) -> str:
        parts = messages[0]["content"]
        [text] = (part["text"].lower() for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        before, after = (colours(base64.b64decode(url.partition(",")[2])) for url in urls)
        if "differences" in text and not self.reporting:
            raise ValueError("no reports today")
        if "obvious differences" in text:
            return "".join(f"- Image {i} shows {', '.join(c)}.\n" for i, c in ((1, before), (2, after)))
        if "detailed differences" in text:
            lines = [
                f"- The {p} patch: {b}, then {a}." for p, b, a in zip(PATCHES, before, after, strict=True) if a != b
            ]
            return "## Compared\n" + ("\n".join(lines) or "- The images are alike.")
        [instruction] = re.findall(r"<start of instruction>\n(.*)\n<end of instruction>", text)
        if "rewrite the instruction" in text:
            draw = random.Random(seed)
            new = f"paint the {draw.choice(PATCHES)} patch {draw.choice(NAMES)}"
            return json.dumps({"reasoning": f"it was {instruction}", "instruction": new}) if self.rewriting else "no"
        found = scores(instruction, before, after)
        dimension = "execution" if "execution score" in text else "consistency"
        seen = f"{', '.join(before)} became {', '.join(after)}"
        return json.dumps({"reasoning": seen, "score": [found[dimension]]})


def pair(index: int, split: str = "train") -> tuple[str, list[bytes]]:
    """Instruction and PNG images of a candidate of seed 0."""
    asked, *images = candidate(index, 0, split)
    return asked, [encode_image(image) for image in images]


def edit_run(**curation: Any) -> dict[str, Any]:
    """A whole configuration: gen-shapes with this world's edits in the place of its images."""
    source = {"kind": "function", "name": "painted", "function": "edits:candidate", "num_images": 240}
    dimensions = {d: {"rubric": rubric} for d, rubric in DIMENSIONS.items()}
    gaps = [f"{d}.{what}" for d in DIMENSIONS for what in ("skill_low", "pairwise")]
    plain = load_config("gen-shapes").model_dump(mode="json", exclude_none=True)
    return {
        **plain,
        "prompts": {"function": "edits:prompts"},
        "policy": {"family": "qwen_image_edit", "model": "Qwen/Qwen-Image-Edit-2509", "resolution": 32},
        "curation": {
            "labeller": "difference_first", "evaluator": TEACHER, "sources": [source], "dimensions": dimensions,
            **curation,
        },
        "critic": {**plain["critic"], "rubrics": SHORT},
        "bench": {"gate": {"rules": [{"metric": "coverage", "at_least": 0.9}], "accept_gaps": gaps}},
        "reward": {"formula": "cme"},
        "auditor": {**plain["auditor"], "judge": TEACHER, "rubrics": DIMENSIONS},
        "further_rounds": {},
    }  # fmt: skip
