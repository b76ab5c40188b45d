"""Makes the shipped critic: `python -m firm.shapes.pretrain_critic OUT`; about half an hour on two cores.

It is to the run's critic what Qwen3-VL-8B is to the paper's: a model that sees, and scores nothing. From rendered
pictures and those of the shipped generators it learns to say what one or two pictures show, whether a picture shows a
thing it is asked for, and what flaws it has.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, get_cosine_schedule_with_warmup

from firm.config import SFTConfig
from firm.critics.encoder import Encoder
from firm.critics.local import load_processor
from firm.images import encode_image
from firm.sft.optimizer import Muon
from firm.sft.train import Collator
from firm.shapes.generation import candidates, draw_prompt
from firm.shapes.models import WEIGHTS, build_critic, load_generator
from firm.shapes.scene import COLOURS, SHAPES, SIZE, Thing
from firm.shapes.vision import Observation, caption, observe

NUM_RENDERED = 60_000
NUM_GENERATED = 20_000  # of each generator
STEPS = 6000
BATCH_SIZE = 64
SEED = 1_000_003  # not one of a run's: curation renders from the run's seed

Row = dict[str, list[dict[str, Any]]]

_log = logging.getLogger("firm.shapes.pretrain_critic")


class Picture(NamedTuple):
    """A picture and what is seen in it."""

    png: bytes
    observation: Observation


def main() -> None:
    """Makes pictures, trains on them and saves the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the critic into")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    rng = np.random.default_rng(SEED)
    images = [image for _, image in candidates(NUM_RENDERED, SEED, "train")]
    for name in ("base", "strong"):
        images += generate(name, NUM_GENERATED, rng)
    _log.info("%d pictures", len(images))
    build_critic(out)
    train(out, [Picture(encode_image(i), observe(i)) for i in images], rng).half().save_pretrained(out)
    build_critic(out)  # the configuration says float32, as whose weights are loaded


def generate(name: str, count: int, rng: np.random.Generator) -> list[Image.Image]:
    """Returns pictures of a shipped generator for train prompts, more or less guided, in few or many steps."""
    pipe = load_generator(WEIGHTS / name)
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    while len(pictures) < count:
        asked = [draw_prompt("train", rng) for _ in range(min(500, count))]
        pictures += pipe(
            asked, num_inference_steps=int(rng.choice([6, 10])), guidance_scale=float(rng.choice([1.0, 1.0, 2.5])),
            height=SIZE, width=SIZE, max_sequence_length=1,
            generator=torch.Generator().manual_seed(int(rng.integers(2**31))),
        ).images  # fmt: skip
    return pictures


def describe(pictures: Sequence[Picture], rng: np.random.Generator) -> Row:
    """Returns a question about one or two pictures and its answer, as a training example."""
    said = [caption(p.observation) for p in pictures]
    if len(pictures) == 2:
        question, answer = "before : <image> after : <image>", f"before : {said[0]} after : {said[1]}"
    else:
        question, answer = _about(pictures[0].observation, rng)
        question, answer = f"{question} <image>", f"{answer} {said[0]}".strip()
    return {
        "messages": [{"content": question}, {"content": answer}],
        "images": [{"bytes": p.png} for p in pictures],
    }


def _about(observation: Observation, rng: np.random.Generator) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.4:
        return "picture", ""
    if kind < 0.6:
        return "texture", f"{flaws(observation)} ;"
    thing = Thing(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
    shown = [Thing(s.colour, s.shape) for s in observation.seen if s.shape != "blob"]
    if shown and rng.random() < 0.5:
        thing = shown[int(rng.integers(len(shown)))]
    return f"a {thing} ?", f"{'yes' if thing in shown else 'no'} ;"


def flaws(observation: Observation) -> str:
    """Says how much of each flaw a picture has, such as "no noise some stain little blur no tint"."""
    o = observation
    measured = {"noise": o.noise / 0.12, "stain": o.stain / 0.09, "blur": o.murk / 0.3, "tint": o.impurity / 0.22}
    words = ("no", "little", "some", "much")
    return " ".join(f"{words[min(3, int(4 * share))]} {flaw}" for flaw, share in measured.items())


def train(folder: Path, pictures: list[Picture], rng: np.random.Generator) -> PreTrainedModel:
    """Trains the model that `folder` describes on random questions; every fifth batch is about pairs of pictures."""
    torch.manual_seed(SEED)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    collate = Collator(Encoder(load_processor(str(folder))))
    optimizer = Muon(model, SFTConfig(learning_rate=4e-3, weight_decay=0.05, adam_beta2=0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 20, STEPS)
    start = time.monotonic()
    for step in range(1, STEPS + 1):
        together = 2 if step % 5 == 0 else 1
        drawn = rng.integers(len(pictures), size=(BATCH_SIZE // together, together))
        loss = model(**collate([describe([pictures[i] for i in row], rng) for row in drawn])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 1:
            _log.info("step %d/%d loss %.4f (%.0f s)", step, STEPS, loss.item(), time.monotonic() - start)
    return model


if __name__ == "__main__":
    main()
