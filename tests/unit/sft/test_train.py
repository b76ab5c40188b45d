"""The Trainer's arguments."""

from functools import cached_property
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from firm.config import SFTConfig
from firm.config.loading import load_config
from firm.critics.encoder import Encoder
from firm.critics.local import load_processor
from firm.records import UserError
from firm.sft import train
from firm.storage.artifacts import Output


def test_a_process_uses_one_gpu_of_a_machine_with_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Workstation(TrainingArguments):
        @cached_property
        def _setup_devices(self) -> torch.device:
            device: torch.device = super()._setup_devices
            self._n_gpu = 3
            return device

    monkeypatch.setattr(train, "TrainingArguments", Workstation)
    made = train.arguments(load_config("gen-shapes").critic, SFTConfig(batch_size=4), 0, tmp_path)
    assert made.train_batch_size == 4


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("gen-shapes", []), ("edit-shapes", []), ("edit-shapes", ["critic.answer_style=score_first"])],
)
def test_the_critics_of_the_shapes_can_write_their_answers(preset: str, changes: list[str]) -> None:
    critic = load_config(preset, changes).critic
    train.check_answers(Encoder(load_processor(critic.model)), critic)


def test_a_tokenizer_that_cannot_write_the_answers_is_named_before_training(tmp_path: Path) -> None:
    config = load_config("gen-shapes", ["critic.answer_style=reason_first"])
    request = {"critic": config.critic.model_dump(), "sft": config.sft.model_dump(), "seed": 0}
    with pytest.raises(UserError, match=r"cannot write its answers: .*boxed.*critic\.answer_style") as caught:
        train.train(request, {}, Output.open(str(tmp_path)))
    assert caught.value.exit_code == 2


def test_muon_is_refused_where_no_matrix_is_whole() -> None:
    with pytest.raises(UserError, match="muon updates whole matrices.*set optimizer to adamw") as caught:
        load_config("gen-shapes", ["sft.sharding=full"])
    assert caught.value.exit_code == 2
    assert load_config("gen-shapes", ["sft.sharding=full", "sft.optimizer=adamw"]).sft.sharding == "full"


@pytest.mark.parametrize(
    ("preset", "sharding"),
    [
        ("gen-sd35", "full"),
        ("edit-qwen-image-edit-2509", "full"),
        ("critic-gen-8b-lora", "none"),
        ("gen-shapes", "none"),
    ],
)
def test_presets_shard_the_critics_that_need_it(preset: str, sharding: str) -> None:
    assert load_config(preset).sft.sharding == sharding
