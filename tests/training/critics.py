"""What tests of training a critic share: its configuration and the examples."""

from pathlib import Path
from typing import Any

from firm.chat.client import open_chat
from firm.config import (
    CriticConfig,
    CurationConfig,
    FunctionSource,
    JudgedDimension,
    PromptsConfig,
    PythonChat,
    SFTConfig,
)
from firm.critics.plan_then_score import PlanThenScore
from firm.curation.examples import student_example
from firm.curation.sources import open_source
from firm.records import Example
from firm.storage.shards import ShardWriter

DIMENSION = "instruction_following"
TEACHER = PythonChat(target="firm.shapes.teacher:PixelTeacher")
PROMPTS = PromptsConfig(function="firm.shapes.generation:prompts")
SOURCE = FunctionSource(name="rendered", function="firm.shapes.generation:candidate", num_images=400)
CRITIC = CriticConfig(
    model="pkg://firm.shapes/weights/critic", answer_style="score_first", dtype="float32",
    rubrics={DIMENSION: "short_instruction_following"}, batch_size=64,
)  # fmt: skip


def make_examples(folder: Path) -> None:
    """``train/`` of 320 rendered examples and ``test/`` of 80."""
    curation = CurationConfig(
        planner=TEACHER, evaluator=TEACHER, sources=[SOURCE], rationale="summary",
        dimensions={DIMENSION: JudgedDimension(rubric="evaluate")},
    )  # fmt: skip
    source = open_source(SOURCE, PROMPTS, 0)
    judge = PlanThenScore(curation, lambda role, chat: open_chat(chat))
    for split, number in (("train", 320), ("test", 80)):
        writer = ShardWriter(folder / split, Example, 128)
        judged = judge.label(source.make(split, range(number)))  # type: ignore[arg-type]
        rubric = CRITIC.rubrics[DIMENSION]  # type: ignore[index]
        writer.write([student_example(j, DIMENSION, rubric, CRITIC.answer_style, curation) for j in judged])
        writer.close()


def request(**changes: Any) -> dict[str, Any]:
    """What the worker of the stage sft is asked, with a few steps unless ``changes`` to its section say otherwise."""
    few: dict[str, Any] = {
        "learning_rate": 2e-3, "max_steps": 100, "batch_size": 32, "gradient_accumulation": 1, "adam_beta2": 0.98,
        "checkpoint_steps": 40,
    }  # fmt: skip
    sft = SFTConfig(**{**few, **changes})
    plain = {"critic": CRITIC.model_dump(mode="json"), "sft": sft.model_dump(mode="json")}
    return {**plain, "seed": 0}
