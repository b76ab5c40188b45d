"""Candidate images, for editing with their sources: sampled from generators, made by a function, or a user's own files.

Candidate ``i`` of a source depends on (seed, source, split, i) only, so a resumed run makes the same candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from firm.config import CandidateSource, CurationConfig, FilesSource, FunctionSource, GeneratedSource, PromptsConfig
from firm.dist import generator
from firm.images import Limits, decode_image, encode_image
from firm.locate import load_object
from firm.prompts import Splits, load_prompts, with_source
from firm.records import SPLITS, Candidate, Prompt, Split, UserError
from firm.seeds import seed_for
from firm.storage.files import parallel, sha256
from firm.storage.given import Given, given
from firm.storage.pictures import image_size, read_image
from firm.texts import check_text, parse_json, read_text

_MADE = "a function gives (prompt, image), where edits are judged (prompt, source image, edited image)"


class Source(Protocol):
    """A source of candidates."""

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """The candidates with these indices."""


def open_source(
    config: CandidateSource,
    prompts: PromptsConfig,
    seed: int,
    kept: Path | None = None,
    limits: Limits | None = None,
) -> Source:
    """Open a source; generators are loaded here and freed with the source.

    ``kept`` is the last round's policy, ``limits`` what images of functions and files may be.
    """
    if isinstance(config, GeneratedSource):
        return Generated(config, prompts, seed, kept)
    splits = Splits(prompts)
    if isinstance(config, FunctionSource):
        return Function(config, splits, seed, limits)
    return Files(config, splits, limits)


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
        from firm.policies.generate import draw, encode

        drawn = [self._draw(split, i) for i in indices]
        images = draw(
            self.policy,
            encode(self.policy, [asked for asked, _ in drawn], guided=self.config.guidance_scale != 1),
            indices,
            self.seed,
            f"candidate/{self.config.name}/{split}",
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
        )
        return [
            Candidate(index=i, prompt=judged, source=self.config.name, split=split, images=with_source(judged, png))
            for i, (_, judged), png in zip(indices, drawn, images, strict=True)
        ]

    def _draw(self, split: Split, index: int) -> tuple[Prompt, Prompt]:
        """The prompt to sample with and the prompt to judge against."""
        prompts = self.prompts[split]
        random = generator(self.seed, "prompt", self.config.name, split, index)
        first, second = torch.randint(len(prompts), (2,), generator=random).tolist()
        mismatch = torch.rand((), generator=random).item() < self.config.mismatched
        asked = prompts[first]
        return asked, asked.model_copy(update={"text": prompts[second if mismatch else first].text})


class Function:
    """Candidates made by a function(index, seed, split) -> (prompt, image) or (prompt, source image, edited image)."""

    def __init__(self, config: FunctionSource, splits: Splits, seed: int, limits: Limits | None = None) -> None:
        self.config = config
        self.limits = limits
        self.splits = splits
        self.seed = seed_for(seed, "source", config.name) % 2**31
        self.function = load_object(config.function, "curation.sources.function")

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """Call the function for each index.

        The prompt may be a text or a `Prompt`. One that names no source image gets the hash of its pixels, so that
        equal instructions for different images stay apart.

        Raises:
            UserError: It gives something else, images of different sizes, or a prompt of the other split: a held-out
                prompt must not train the critic.
        """
        made = []
        for i in indices:
            prompt, images = self._call(i, split)
            if len(images) > 1 and prompt.image is None:
                prompt = Prompt(text=prompt.text, image=f"sha256:{sha256(images[0])}")
            if self.splits.of(prompt) != split:
                what = (
                    f"{self.config.function} gives a prompt of the other split when asked for {split}: {prompt.text!r}"
                )
                fix = "give prompts of the split that is asked for, see firm.prompts.Splits"
                raise UserError(what, "curation.sources.function", fix, usage=True)
            same_size(images, self._where(i, split))
            made.append(Candidate(index=i, prompt=prompt, source=self.config.name, split=split, images=images))
        return made

    def _call(self, index: int, split: Split) -> tuple[Prompt, list[bytes]]:
        match self.function(index, self.seed, split):
            case (str() | Prompt() as asked, *pictures) if pictures and all(
                isinstance(p, Image.Image) for p in pictures
            ):
                check_text(str(asked), self._where(index, split))
                prompt = asked if isinstance(asked, Prompt) else Prompt(text=asked)
                return prompt, [encode_image(p, self._where(index, split), self.limits) for p in pictures]
            case made:
                what = f"{self.config.function} gives no prompt with images for {split} {index}: {made!r:.200}"
                raise UserError(what, "curation.sources.function", _MADE, usage=True)

    def _where(self, index: int, split: Split) -> str:
        return f"{self.config.function}, {split} {index}"


class Files:
    """A user's images: JSONL rows of {"prompt": ..., "image": path relative to the file}, here, in S3 or on the hub.

    An image is fetched when its candidate is made, and not kept.

    For editing a row has ``source_image``, too: what was edited into ``image``, of the same size.

    Attributes:
        rows: Split -> (number of the entry, prompt, images), in the order of the file.
    """

    def __init__(self, config: FilesSource, splits: Splits, limits: Limits | None = None) -> None:
        self.config = config
        self.limits = limits
        self.file = given(config.path)
        self.rows: dict[Split, list[tuple[int, Prompt, list[str]]]] = {split: [] for split in SPLITS}
        for entry, (prompt, images) in enumerate(_read_rows(self.file)):
            self.rows[splits.of(prompt)].append((entry, prompt, images))

    def check(self, wanted: int) -> None:
        """Check the heads of all images, and that each entry has as many as are ``wanted``.

        Raises:
            UserError: An image is missing or beyond the limits, or an entry has a source image too many or too few.
        """
        rows = sorted((row for rows in self.rows.values() for row in rows), key=lambda row: row[0])
        for entry, _, images in rows:
            if len(images) != wanted:
                what = f"the evaluator's rubrics judge {wanted} image(s), not {len(images)}"
                fix = (
                    "give each entry a source_image"
                    if wanted > 1
                    else "leave source_image out, or use rubrics of edits"
                )
                raise UserError(what, self._where(entry, images[-1]), fix, True)
        named = [(entry, name) for entry, _, images in rows for name in images]
        parallel(lambda one: image_size(self.file.beside(one[1]), self._where(*one), self.limits), named)

    def _where(self, entry: int, image: str) -> str:
        return f"{self.file.name}, entry {entry}: {image}"

    def make(self, split: Split, indices: Sequence[int]) -> list[Candidate]:
        """Read, check and re-encode files."""
        return parallel(lambda i: self._make(split, i), indices)

    def _make(self, split: Split, index: int) -> Candidate:
        entry, prompt, names = self.rows[split][index]
        images = [read_image(self.file.beside(name), self._where(entry, name), self.limits) for name in names]
        same_size(images, self._where(entry, names[-1]))
        return Candidate(index=index, prompt=prompt, source=self.config.name, split=split, images=images)


def check_images(candidates: Sequence[Candidate], wanted: int) -> None:
    """Check that candidates have as many images as the evaluator's rubrics judge.

    Raises:
        UserError: One has not; its source is named.
    """
    for candidate in candidates:
        if len(candidate.images) != wanted:
            what = f"the evaluator's rubrics judge {wanted} image(s), not {len(candidate.images)}"
            where = f"curation.sources: {candidate.source}, {candidate.split} {candidate.index}"
            raise UserError(what, where, _MADE, usage=True)


def same_size(images: Sequence[bytes], where: str) -> None:
    """Check that an edited image has the size of its source.

    Raises:
        UserError: It has not: what moved could not be told from what was cut off.
    """
    sizes = [decode_image(png, where).size for png in images] if len(images) > 1 else []
    if len(set(sizes)) > 1:
        (w, h), (width, height) = sizes[:2]
        what = f"the source image has {w} x {h} pixels, the edited one {width} x {height}"
        raise UserError(what, where, "scale one of them to the size of the other", True)


def _read_rows(file: Given) -> list[tuple[Prompt, list[str]]]:
    text = read_text(file.fetch(), "candidates", name=file.name)
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError("the candidate file is empty", file.name, "give at least one line", True)
    return [_parse_row(line, file, f"{file.name}, line {i}") for i, line in lines]


_ROW = 'every line must be {"prompt": "...", "image": "file.png"}, for editing with "source_image": "file.png"'


def _parse_row(line: str, file: Given, where: str) -> tuple[Prompt, list[str]]:
    row = parse_json(line, where, _ROW)
    if not isinstance(row, dict):
        raise UserError("not a candidate", where, _ROW, True)
    if missing := [key for key in ("prompt", "image") if key not in row]:
        raise UserError(f"a candidate without {missing[0]!r}", where, _ROW, True)
    prompt, image, source = row["prompt"], row["image"], row.get("source_image")
    names = [image] if source is None else [source, image]
    if not all(isinstance(value, str) and value.strip() for value in (prompt, *names)):
        raise UserError("prompt and images must be texts, and not empty", where, _ROW, True)
    for value in (prompt, *names):
        check_text(value, where)
    return Prompt(text=prompt, image=None if source is None else file.beside(source)), names
