"""Candidate images: sampled from generators, made by a function, or a user's own files.

Candidate ``i`` of a source depends on (seed, source, split, i) only, so a resumed run makes the same candidates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from firm.config import CandidateSource, CurationConfig, FilesSource, FunctionSource, GeneratedSource, PromptsConfig
from firm.dist import generator
from firm.images import encode_image, read_image
from firm.locate import load_object
from firm.prompts import Splits, load_prompts
from firm.records import SPLITS, Candidate, Prompt, Split, UserError
from firm.seeds import seed_for


class Source(Protocol):
    """A source of candidates."""

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """The candidates with these indices."""


def open_source(config: CandidateSource, prompts: PromptsConfig, seed: int, kept: Path | None = None) -> Source:
    """Open a source; generators are loaded here and freed with the source. ``kept``: the last round's policy."""
    if isinstance(config, GeneratedSource):
        return Generated(config, prompts, seed, kept)
    splits = Splits(prompts)
    return Function(config, splits, seed) if isinstance(config, FunctionSource) else Files(config, splits)


def count(config: CandidateSource, curation: CurationConfig, prompts: PromptsConfig, split: Split) -> int:
    """Number of candidates of a split; a user's images follow the split of their prompts."""
    if isinstance(config, FilesSource):
        return len(Files(config, Splits(prompts)).rows[split])
    test = round(config.num_images * curation.test_share)
    return test if split == "test" else config.num_images - test


def no_candidates(split: Split) -> UserError:
    """The error when no source has a candidate of a split."""
    fix = "give more candidates, or change the share (prompts.test_share for a source of files)"
    return UserError(f"there are no candidates in the {split} split", "curation.test_share", fix, usage=True)


def no_kept_policy(where: str) -> UserError:
    """The error when the first round asks for the policy of the last."""
    fix = "name a policy here; `kept` is for further_rounds.curation"
    return UserError("no policy was kept before the second round", where, fix, usage=True)


class Generated:
    """Samples of a generator; a share of them is paired with another prompt on purpose."""

    def __init__(self, config: GeneratedSource, prompts: PromptsConfig, seed: int, kept: Path | None = None) -> None:
        from firm.policies.policy import Policy, load_policy

        self.config = config
        self.seed = seed
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.policy != "kept":
            self.policy = Policy(config.policy, device)
        elif kept is not None:
            self.policy = load_policy(kept, device)
        else:
            raise no_kept_policy(f"curation.sources, {config.name}")
        self.prompts = {split: load_prompts(prompts, split) for split in SPLITS}

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """Sample a batch."""
        from firm.policies.generate import draw

        drawn = [self._draw(split, i) for i in indices]
        images = draw(
            self.policy,
            [asked for asked, _ in drawn],
            indices,
            self.seed,
            f"candidate/{self.config.name}/{split}",
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
        )
        return [
            Candidate(index=i, prompt=judged, source=self.config.name, split=split, images=[png])
            for i, (_, judged), png in zip(indices, drawn, images, strict=True)
        ]

    def _draw(self, split: Split, index: int) -> tuple[Prompt, Prompt]:
        """The prompt to sample with and the prompt to judge against."""
        prompts = self.prompts[split]
        random = generator(self.seed, "prompt", self.config.name, split, index)
        first, second = torch.randint(len(prompts), (2,), generator=random).tolist()
        mismatch = torch.rand((), generator=random).item() < self.config.mismatched
        return prompts[first], prompts[second if mismatch else first]


class Function:
    """Candidates made by a function(index, seed, split) -> (prompt, image)."""

    def __init__(self, config: FunctionSource, splits: Splits, seed: int) -> None:
        self.config = config
        self.splits = splits
        self.seed = seed_for(seed, "source", config.name) % 2**31
        self.function = load_object(config.function, "curation.sources.function")

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """Call the function for each index.

        Raises:
            UserError: It gives a prompt of the other split: a held-out prompt must not train the critic.
        """
        made = []
        for i in indices:
            text, image = self.function(i, self.seed, split)
            prompt = Prompt(text=text)
            if self.splits.of(prompt) != split:
                what = f"{self.config.function} gives a prompt of the other split when asked for {split}: {text!r}"
                fix = "give prompts of the split that is asked for, see firm.prompts.Splits"
                raise UserError(what, "curation.sources.function", fix, usage=True)
            png = encode_image(image)
            made.append(Candidate(index=i, prompt=prompt, source=self.config.name, split=split, images=[png]))
        return made


class Files:
    """A user's images: JSONL rows of {"prompt": ..., "image": path relative to the file}.

    Attributes:
        rows: Split -> (number of the entry, prompt, image), in the order of the file.
    """

    def __init__(self, config: FilesSource, splits: Splits) -> None:
        self.config = config
        self.path = Path(config.path)
        self.rows: dict[Split, list[tuple[int, Prompt, str]]] = {split: [] for split in SPLITS}
        for entry, (prompt, image) in enumerate(_read_rows(self.path)):
            self.rows[splits.of(prompt)].append((entry, prompt, image))

    def check(self) -> None:
        """Check that every image exists, without reading it.

        Raises:
            UserError: An image is missing.
        """
        for entry, _, image in sorted((row for rows in self.rows.values() for row in rows), key=lambda row: row[0]):
            if not (self.path.parent / image).is_file():
                raise UserError("there is no such image", self._where(entry, image), "correct the path", True)

    def _where(self, entry: int, image: str) -> str:
        return f"{self.path}, entry {entry}: {image}"

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """Read, check and re-encode files."""
        made = []
        for i in indices:
            entry, prompt, image = self.rows[split][i]
            png = read_image(self.path.parent / image, self._where(entry, image))
            made.append(Candidate(index=i, prompt=prompt, source=self.config.name, split=split, images=[png]))
        return made


def _read_rows(path: Path) -> list[tuple[Prompt, str]]:
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


def _parse_row(line: str, where: str) -> tuple[Prompt, str]:
    try:
        row = json.loads(line)
        prompt = row["prompt"]
        image = row["image"]
    except KeyError as error:
        raise UserError(f"a candidate without {error}", where, _ROW, True) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"not a candidate: {error}", where, _ROW, True) from error
    if not (isinstance(prompt, str) and prompt.strip() and isinstance(image, str) and image):
        raise UserError("prompt and image must be texts, and not empty", where, _ROW, True)
    return Prompt(text=prompt), image
