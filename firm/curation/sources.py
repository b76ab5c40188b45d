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
    if isinstance(config, FilesSource):
        total, test = Files(config).sizes(curation.test_share)
    else:
        total, test = config.num_images, round(config.num_images * curation.test_share)
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
        self.rows = rows = _read_rows(self.path)
        self.order = sorted(range(len(rows)), key=lambda i: (seed_for(0, "split", rows[i][0]), i))

    def sizes(self, test_share: float) -> tuple[int, int]:
        """Number of rows, and of those for testing: near ``test_share``, with all images of a prompt in one split."""
        prompts, total = [self.rows[i][0] for i in self.order], len(self.order)
        edges = [n for n in range(total + 1) if n in (0, total) or prompts[-n] != prompts[-n - 1]]
        return total, min(edges, key=lambda n: abs(n - total * test_share))

    def check(self) -> None:
        """Look for every image, without reading it.

        Raises:
            UserError: One is not there.
        """
        for row, (_, name) in enumerate(self.rows):
            if not (self.path.parent / name).is_file():
                raise UserError("there is no such image", self._where(row), "correct the path", True)

    def _where(self, row: int) -> str:
        return f"{self.path}, entry {row}: {self.rows[row][1]}"

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """Read, check and re-encode files; of the shuffled rows the first train, the last test."""
        made = []
        for i in indices:
            row = self.order[i] if split == "train" else self.order[-1 - i]
            prompt, name = self.rows[row]
            where = self._where(row)
            try:
                png = encode_image(decode_image((self.path.parent / name).read_bytes(), where))
            except OSError as error:
                raise UserError(f"cannot read an image: {error.strerror}", where, "correct the path", True) from error
            except UserError as error:
                raise UserError(error.what, error.where, error.fix, usage=True) from error
            made.append(Candidate(index=i, prompt=prompt, source=self.config.name, split=split, images=[png]))
        return made


def _read_rows(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read candidates: {error.strerror}", str(path), "check the path", True) from error
    except UnicodeDecodeError as error:
        raise UserError("not a candidate file: it is not UTF-8 text", str(path), _ROW, True) from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError("the candidate file is empty", str(path), "give at least one line", True)
    return [_parse_row(line, f"{path}, line {i}") for i, line in lines]


_ROW = 'every line must be {"prompt": "...", "image": "file.png"}'


def _parse_row(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        prompt, image = row["prompt"], row["image"]
    except KeyError as error:
        raise UserError(f"a candidate without {error}", where, _ROW, True) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"not a candidate: {error}", where, _ROW, True) from error
    if not (isinstance(prompt, str) and prompt.strip() and isinstance(image, str) and image):
        raise UserError("prompt and image must be texts, and not empty", where, _ROW, True)
    return prompt, image
