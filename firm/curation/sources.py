"""Candidate images: sampled from generators, made by a function, or a user's own files.

Item ``i`` of a source depends on (seed, source, split, i) only, so a resumed run makes the same items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from firm.config import CandidateSource, CurationConfig, FilesSource, FunctionSource, GeneratedSource, PromptsConfig
from firm.dist import generator
from firm.images import decode_image, encode_image
from firm.locate import load_object
from firm.prompts import load_prompts
from firm.records import Candidate, Split, UserError
from firm.seeds import seed_for


class Source(Protocol):
    """A source of candidates."""

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """The candidates with these indices."""


def open_source(config: CandidateSource, prompts: PromptsConfig, seed: int) -> Source:
    """Open a source; generators are loaded here and freed with the source."""
    if isinstance(config, GeneratedSource):
        return Generated(config, prompts, seed)
    return Function(config, seed) if isinstance(config, FunctionSource) else Files(config)


def count(config: CandidateSource, curation: CurationConfig, split: Split) -> int:
    """Number of candidates of a split; a user's files are counted as they are."""
    total = len(_read_rows(Path(config.path))) if isinstance(config, FilesSource) else config.num_images
    test = round(total * curation.test_share)
    return test if split == "test" else total - test


class Generated:
    """Samples of a generator; a share of them is paired with another prompt on purpose."""

    def __init__(self, config: GeneratedSource, prompts: PromptsConfig, seed: int) -> None:
        from firm.policies.policy import Policy

        self.config, self.seed = config, seed
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = Policy(config.policy, device)
        self.prompts: dict[Split, list[str]] = {
            "train": load_prompts(prompts, "train"),
            "test": load_prompts(prompts, "test"),
        }
        self.negative = self.policy.encode([""]) if config.guidance_scale != 1 else None

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """Sample a batch."""
        from firm.policies.sampler import noise_for, sample

        drawn = [self._draw(split, i) for i in indices]
        unique = list(dict.fromkeys(asked for asked, _ in drawn))
        rows = torch.tensor([unique.index(asked) for asked, _ in drawn], device=self.policy.device)
        conditions = self.policy.encode(unique).select(rows)
        purpose = f"candidate/{self.config.name}/{split}"
        noise = noise_for(self.policy.latent_shape, self.seed, purpose, indices)
        steps, scale = self.config.num_inference_steps, self.config.guidance_scale
        latents = sample(self.policy, conditions, noise, steps, guidance_scale=scale, negative=self.negative)
        images = self.policy.decode(latents).cpu().numpy()
        return [
            Candidate(
                index=i,
                prompt=judged,
                source=self.config.name,
                split=split,
                images=[encode_image(Image.fromarray(image))],
            )
            for i, (_, judged), image in zip(indices, drawn, images, strict=True)
        ]

    def _draw(self, split: Split, index: int) -> tuple[str, str]:
        """The prompt to sample with and the prompt to judge against."""
        prompts = self.prompts[split]
        random = generator(self.seed, "prompt", self.config.name, split, index)
        first, second = torch.randint(len(prompts), (2,), generator=random).tolist()
        mismatch = torch.rand((), generator=random).item() < self.config.mismatched
        return prompts[first], prompts[second if mismatch else first]


class Function:
    """Candidates made by a function(index, seed, split) -> (prompt, image)."""

    def __init__(self, config: FunctionSource, seed: int) -> None:
        self.config, self.seed = config, seed_for(seed, "source", config.name) % 2**31
        self.function = load_object(config.function, "curation.sources.function")

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """Call the function for each index."""
        pairs = [(i, *self.function(i, self.seed, split)) for i in indices]
        name = self.config.name
        return [
            Candidate(index=i, prompt=prompt, source=name, split=split, images=[encode_image(image)])
            for i, prompt, image in pairs
        ]


class Files:
    """A user's images: JSONL rows of {"prompt": ..., "image": path relative to the file}."""

    def __init__(self, config: FilesSource) -> None:
        self.config, self.path = config, Path(config.path)
        rows = _read_rows(self.path)
        self.order = sorted(range(len(rows)), key=lambda i: seed_for(0, "split", rows[i][0], i))
        self.rows = rows

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """Read, check and re-encode files; of the shuffled rows the first train, the last test."""
        made = []
        for i in indices:
            row = self.order[i] if split == "train" else self.order[-1 - i]
            prompt, name = self.rows[row]
            where = f"{self.path}, entry {row}: {name}"
            try:
                data = (self.path.parent / name).read_bytes()
            except OSError as error:
                raise UserError(f"cannot read an image: {error.strerror}", where, "correct the path", True) from error
            png = encode_image(decode_image(data, where))
            made.append(Candidate(index=i, prompt=prompt, source=self.config.name, split=split, images=[png]))
        return made


def _read_rows(path: Path) -> list[tuple[str, str]]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines]
        found = [(row["prompt"], row["image"]) for row in rows]
    except OSError as error:
        raise UserError(f"cannot read candidates: {error.strerror}", str(path), "check the path", True) from error
    except (ValueError, KeyError, TypeError) as error:
        fix = 'every line must be {"prompt": "...", "image": "file.png"}'
        raise UserError(f"not a candidate file: {error}", str(path), fix, True) from error
    if not found:
        raise UserError("the candidate file is empty", str(path), "give at least one line", True)
    return found
