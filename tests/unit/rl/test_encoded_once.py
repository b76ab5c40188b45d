"""RL encodes the prompts of an epoch once and those of its checks once; encoders may wait on the host meanwhile."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from shared import EDITING, GENERATION, Redness

from firm.config.loading import load_config
from firm.dist import Ranks
from firm.policies.encoders import tensors_of
from firm.rl import train as rl_train
from firm.rl.train import RLTrainer

DEVICE = torch.device("cpu", 0)  # to torch another place than "cpu": what is moved there is copied


def trained(task: str, wait: bool) -> tuple[RLTrainer, list[str], list[Any]]:
    """A trainer after two epochs and all audits, passes and whether encoders were away from the host, and results."""
    few = {
        "prompts_per_epoch": 2, "group_size": 3, "max_epochs": 2, "num_inference_steps": 2, "batch_size": 2,
        "timesteps": "uniform", "lora": {"rank": 2, "alpha": 4},
    }  # fmt: skip
    lines = [f"rl.{key}={json.dumps(value)}" for key, value in few.items()]
    config = load_config(task, [*lines, "auditor.num_images=5", f"policy.offload_encoders={json.dumps(wait)}"])
    judge = Redness(dimensions=config.dimensions)
    with patch.object(rl_train, "load_critic", lambda *_: judge):
        trainer = RLTrainer(config, Path(), Ranks(0, 1, DEVICE))  # type: ignore[arg-type]
    trainer.auditor.judge = judge
    encoders, denoiser = trainer.policy.family.encoders, trainer.policy.family.denoiser
    home = [t.data_ptr() for t in tensors_of(encoders)]
    done: list[str] = []

    def note(name: str) -> None:
        moved = [t.data_ptr() for t in tensors_of(encoders)] != home
        done.append(f"{name} away" if moved else name)

    encoders[0].register_forward_pre_hook(lambda *_: note("encoder"))
    denoiser.register_forward_pre_hook(lambda *_: note("denoiser"))
    seen: list[Any] = []
    for work in ("check", "run_epoch", "check", "run_epoch", "check", "choose"):
        done.append(work)
        seen.append(getattr(trainer, work)())
    return trainer, done, [*seen, trainer.history, [item.images for item in judge.asked]]


@pytest.mark.parametrize("task", [GENERATION, EDITING])
def test_prompts_are_encoded_once_and_encoders_that_wait_change_nothing(task: str) -> None:
    (plain, passes, seen), (waiting, moved, same) = (trained(task, wait) for wait in (False, True))
    encoded = [name for name in passes if name != "denoiser"]
    assert encoded[:8] == ["check", "encoder", "run_epoch", "encoder", "check", "run_epoch", "encoder", "check"]
    assert encoded[8:] == ["choose", "encoder", "encoder"]  # the sample that chooses, and the one that measures
    assert moved == ["encoder away" if name == "encoder" else name for name in passes]  # the denoiser never sees them
    assert seen == same
    expected = plain.tensors()
    for name, tensor in waiting.tensors().items():
        assert torch.equal(tensor, expected[name]), name
