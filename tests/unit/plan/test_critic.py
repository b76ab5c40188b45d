"""Planned costs of a critic against what is measured when it really trains and judges, on a CPU."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shared import CPU
from unit.plan.measured import flops_of, medium_critic, most_allocated, near, slowly

from firm.config import CriticConfig, LoraConfig, SFTConfig
from firm.critics.encoder import Encoder
from firm.critics.judge import JudgeInput, question
from firm.critics.local import LocalCritic, load_processor
from firm.critics.rubrics import load_rubric
from firm.images import encode_image
from firm.plan.assumptions import Assumptions
from firm.plan.critic import Questions, judging, training
from firm.records import Prompt, UserError
from firm.sft.optimizer import Muon
from firm.sft.train import Collator, PlainTrainer, arguments, prepare
from firm.shapes.models import WEIGHTS

RUBRICS = {"instruction_following": "short_instruction_following", "quality": "short_quality"}
PROMPT = Prompt(text="a red circle left of a blue square")
PNG = encode_image(Image.new("RGB", (32, 32), "gray"))
ANSWER = "Score: 3 the background is red and the circle is blue, the square is missing."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"tiny": WEIGHTS / "critic", "medium": medium_critic(tmp_path_factory.mktemp("models") / "critic")}


def critic_of(folder: Path, **changes: Any) -> CriticConfig:
    plain = {"model": str(folder), "answer_style": "score_first", "dtype": "float32", "rubrics": RUBRICS}
    return CriticConfig(**{**plain, "batch_size": 8, **changes})


def asked(critic: CriticConfig) -> Questions:
    encoder = Encoder(load_processor(critic.model))
    given = Assumptions(prompt_tokens=len(encoder.answers([PROMPT.text])[0]) - 1)
    return Questions.of(critic, Path(critic.model), 32, given)


def example(critic: CriticConfig, dimension: str) -> dict[str, Any]:
    text = question(load_rubric(critic.rubrics[dimension]), PROMPT)
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
    return {"messages": said, "images": [{"bytes": PNG}]}


def trainer_of(critic: CriticConfig, sft: SFTConfig, folder: Path) -> PlainTrainer:
    """The Trainer of sft, on examples of the longest question."""
    rows = [example(critic, "instruction_following")] * 64
    made = arguments(critic, sft, 0, folder)
    made.report_to = []
    collator = Collator(Encoder(load_processor(critic.model)))
    model = prepare(critic, sft, 0)
    muon = Muon(model, sft) if sft.optimizer == "muon" else None
    return PlainTrainer(model=model, args=made, data_collator=collator, train_dataset=rows, optimizers=(muon, None))


SETTINGS = {
    "whole": {},
    "muon": {"optimizer": "muon"},
    "accumulated": {"gradient_accumulation": 2},
    "checkpointed in bfloat16": {"gradient_checkpointing": True, "dtype": "bfloat16"},
    "LoRA in bfloat16": {"lora": LoraConfig(rank=8), "dtype": "bfloat16"},
}


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ("tiny", "checkpointed in bfloat16"),
        *slowly(product(["tiny"], ["whole", "muon", "accumulated", "LoRA in bfloat16"])),
        *slowly(product(["medium"], SETTINGS)),
    ],
)
def test_training(folders: dict[str, Path], size: str, settings: str, tmp_path: Path) -> None:
    plain = {"batch_size": 8, "gradient_accumulation": 1, "max_steps": 2, "checkpoint_steps": 2, **SETTINGS[settings]}
    critic = critic_of(folders[size], dtype=plain.pop("dtype", "float32"))
    sft = SFTConfig(**plain)
    answers = len(Encoder(load_processor(critic.model)).answers([ANSWER])[0])
    planned = training(critic, sft, asked(critic), answers, workers=1)
    trainer = trainer_of(critic, sft, tmp_path)
    before = sum(t.nbytes for t in (*trainer.model.parameters(), *trainer.model.buffers()))
    name = f"sft, {size}, {settings}"
    near(f"{name}: bytes", planned.memory.total(), before + most_allocated(trainer.train))
    states = sum(t.nbytes for state in trainer.optimizer.state.values() for t in state.values())
    near(f"{name}: bytes of states", planned.memory["states"], states)
    near(f"{name}: bytes of weights", planned.memory["weights"], before)
    files = [p for p in (tmp_path / "checkpoint-2").iterdir() if p.suffix == ".safetensors"]
    near(f"{name}: bytes of a checkpoint", planned.checkpoint, sum(p.stat().st_size for p in files))
    batch = trainer.data_collator([trainer.train_dataset[0]] * sft.batch_size)
    near(f"{name}: FLOPs", planned.batch.flops, flops_of(lambda: trainer.training_step(trainer.model, batch, 1)))


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ("tiny", "score_first"),
        ("tiny", "reason_first"),
        *slowly([("tiny", "reason_first three times")]),
        *slowly(product(["medium"], ["score_first", "reason_first", "reason_first three times"])),
    ],
)
def test_judging(folders: dict[str, Path], size: str, settings: str) -> None:
    style, _, several = settings.partition(" ")
    critic = critic_of(folders[size], answer_style=style, max_new_tokens=24, num_samples=3 if several else 1)
    planned = judging(critic, asked(critic), answer_tokens=critic.max_new_tokens)
    judge = LocalCritic(folders[size], critic, CPU)
    judge.model.generation_config.eos_token_id = None  # no answer ends by itself
    near(f"critic, {size}: bytes of weights", planned.weights, sum(p.nbytes for p in judge.model.parameters()))
    items = [JudgeInput(PROMPT, [PNG])] * critic.batch_size
    name = f"judging, {size}, {settings}"
    near(f"{name}: FLOPs", planned.item.flops * len(items), flops_of(lambda: judge.judge(items)))
    near(f"{name}: bytes", planned.memory.total(), most_allocated(lambda: judge.judge(items)))


@pytest.mark.parametrize(
    ("rubric", "max_pixels"),
    [("short_quality", None), ("evaluate", None), ("evaluate_execution", None), ("short_quality", 600)],
)
def test_questions_have_as_many_tokens_as_the_encoder_makes(rubric: str, max_pixels: int | None) -> None:
    critic = critic_of(WEIGHTS / "critic", rubrics={"one": rubric}, max_pixels=max_pixels)
    found = load_rubric(rubric)
    made = Encoder(load_processor(critic.model, max_pixels)).questions(
        [question(found, PROMPT)], [[PNG] * found.images]
    )
    batch = asked(critic).batch(prepare(critic, SFTConfig(), 0).config, "one", 1)
    assert abs(batch["input_ids"].shape[1] - made["input_ids"].shape[1]) <= 2
    assert batch["image_grid_thw"].equal(made["image_grid_thw"])
    assert batch["pixel_values"].shape == made["pixel_values"].shape


def test_data_parallel_workers_hold_buckets() -> None:
    critic, sft = critic_of(WEIGHTS / "critic"), SFTConfig(batch_size=2)
    memory = training(critic, sft, asked(critic), 8, workers=8).memory
    assert memory["buckets"] == sum(p.nbytes for p in prepare(critic, sft, 0).parameters())


@pytest.mark.parametrize("lora", [None, {"rank": 8, "alpha": 16}], ids=["whole", "lora"])
def test_workers_that_share_a_critic_hold_an_eighth_each(lora: dict[str, int] | None) -> None:
    critic = critic_of(WEIGHTS / "critic", dtype="bfloat16")
    sft = SFTConfig(batch_size=2, lora=lora, sharding="full")
    eight, one = (training(critic, sft, asked(critic), 8, workers) for workers in (8, 1))
    for part in ("weights", "gradients", "states"):
        assert eight.memory[part] == pytest.approx(one.memory[part] / 8, rel=0.02), part
    assert eight.memory["buckets"] > 0 and eight.checkpoint == pytest.approx(one.checkpoint, rel=0.01)
    copies = one.memory["activations"] - eight.memory["activations"]  # of weights in bfloat16, which autocast makes
    assert copies > 0 if lora is None else copies == 0


def test_a_critic_that_is_not_like_those_of_qwen_is_named(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS / "critic", tmp_path, dirs_exist_ok=True)
    critic = critic_of(tmp_path)
    questions = asked(critic)
    change(tmp_path / "config.json", model_type="bert")
    with pytest.raises(UserError, match=r"cannot load a critic: .*BertConfig"):
        judging(critic, questions, 8)
    (tmp_path / "tokenizer.json").unlink()
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text('{"image_processor": {"size": {"height": 224, "width": 224}}}')
    with pytest.raises(UserError, match=r"no image processor like Qwen-VL's \(critic\.model\)"):
        Questions.of(critic, tmp_path, 32, Assumptions())


def test_a_critic_that_cannot_be_gone_through_is_named(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS / "critic", tmp_path, dirs_exist_ok=True)
    vision = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    change(tmp_path / "config.json", vision_config=vision | {"out_hidden_size": vision["out_hidden_size"] * 2})
    critic = critic_of(tmp_path)
    for plan in (judging, lambda *given: training(given[0], SFTConfig(), *given[1:], workers=1)):
        with pytest.raises(
            UserError, match=r"cannot plan with .*: \w+Error: .* \(critic\.model\)\n.*of Qwen-VL's kind"
        ):
            plan(critic, asked(critic), 8)


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
