"""`make gpu-check` at tiny sizes, on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared import CPU

from firm.config import SteeredRun
from firm.config.loading import load_config
from firm.gpu_check import CRITICS, POLICIES, check_critic, check_policy
from firm.plan.assumptions import Assumptions

GIVEN = Assumptions(prompt_tokens=8, answer_tokens=8, image_side=32)
KEYS = {"seconds", "items_a_gpu_second", "mfu", "planned_memory_gb", "memory/process_gb"}


@pytest.mark.parametrize("preset", ["gen-shapes", "edit-shapes"])
def test_a_policy_with_random_weights_is_rolled_out_and_updated(preset: str) -> None:
    changes = ["rl.batch_size=2", "rl.num_inference_steps=3", "rl.lora={rank: 4, alpha: 8}", "rl.inner_epochs=1"]
    config = load_config(preset, changes).having(SteeredRun, "the test")
    found = check_policy(config, CPU, GIVEN)
    assert set(found) == {"rollout", "update", "both"}
    assert all(set(found[part]) >= KEYS and found[part]["tflop"] > 0 for part in ("rollout", "update"))
    seconds = found["rollout"]["seconds"] + found["update"]["seconds"]
    assert found["both"]["images_a_gpu_second"] == pytest.approx(2 / seconds)


def test_a_critic_with_random_weights_makes_a_step() -> None:
    found = check_critic(load_config("gen-shapes", ["sft.optimizer=adamw", "sft.batch_size=2"]), CPU, GIVEN)
    assert set(found) == {"sft step"} and set(found["sft step"]) >= KEYS


def test_the_cases_are_configurations() -> None:
    for preset, changes in (*POLICIES.values(), *CRITICS.values()):
        assert load_config(preset, changes).launch.gpus


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-m", "firm.gpu_check", str(tmp_path / "gpu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no GPU can be used" in done.stderr and not (tmp_path / "gpu").exists()
