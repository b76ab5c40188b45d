"""A policy whose frozen base is shared by two processes trains, samples and is saved as one that is whole on both."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from shared import CPU, EDITING, GENERATION, Redness, python_path
from torch.distributed.tensor import DTensor

from firm import dist
from firm.config import RunConfig
from firm.config.launch import LocalLaunch
from firm.config.loading import load_config
from firm.dist import Ranks
from firm.launch.job import TrainingJob, worker_main
from firm.launch.launcher import launch
from firm.policies.policy import save_policy
from firm.records import UserError
from firm.rl import train as rl_train
from firm.rl.train import RLTrainer
from firm.storage.artifacts import Output
from firm.storage.checkpoint import save_state
from firm.storage.files import files_below, sha256_file


def settings(task: str, **changes: Any) -> RunConfig:
    """A run of two epochs in which the ranks have different numbers of batches."""
    few = {
        "prompts_per_epoch": 4, "group_size": 4, "max_epochs": 2, "num_inference_steps": 2, "batch_size": 3,
        "timesteps": "uniform", "num_timesteps": 2, "kl_weight": 0.1, "kl_share": 0.3, "adv_clip_max": 1,
        "optimizer_steps": 2, "inner_epochs": 1, "lora": {"rank": 2, "alpha": 4}, **changes,
    }  # fmt: skip
    lines = [f"rl.{key}={json.dumps(value)}" for key, value in few.items()]
    return load_config(task, [*lines, "auditor.num_images=7"])


def make(config: RunConfig, judge: Redness, ranks: Ranks) -> RLTrainer:
    """A trainer with the same judge as critic and auditor."""
    with patch.object(rl_train, "load_critic", lambda *_: judge):
        trainer = RLTrainer(config, Path(), ranks)
    trainer.auditor.judge = judge
    return trainer


@pytest.mark.parametrize("task", [GENERATION, EDITING])
def test_a_shared_base_gives_the_same_samples_updates_and_files(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", python_path(here, here.parent))
    monkeypatch.delenv("FIRM_LIFELINE_PID", raising=False)
    job = TrainingJob("run", "rl", Path(__file__).stem, {"task": task}, {})
    launch(job, Output.open(str(tmp_path)), LocalLaunch(num_workers=2))
    for rank in range(2):
        whole, shared = (json.loads((tmp_path / f"{name}{rank}.json").read_text()) for name in ("none", "base"))
        assert shared.pop("base_elements") <= 0.6 * whole.pop("base_elements")
        assert len(set(whole.pop("passes"))) == 2 and len(set(shared.pop("passes"))) == 1, "a pass is one of all ranks"
        assert shared == whole


def test_an_audit_without_images_for_a_rank_is_refused() -> None:
    config = settings(GENERATION, sharding="base")
    config = config.model_copy(update={"auditor": config.auditor.model_copy(update={"num_images": 2})})
    with pytest.raises(UserError, match="every rank takes part") as caught:
        make(config, Redness(), Ranks(0, 3, CPU))
    assert caught.value.exit_code == 2


def test_full_fine_tuning_is_not_sharded() -> None:
    with pytest.raises(UserError, match="sharding: base needs a lora"):
        settings(GENERATION, sharding="base", lora=None)


def train(request: dict[str, Any], inputs: Mapping[str, Path], out: Output) -> None:
    """The worker of the test above."""
    ranks = dist.start()
    for sharding in ("none", "base"):
        config = settings(request["task"], sharding=sharding, gradient_checkpointing=True)
        judge = Redness(dimensions=config.dimensions)
        trainer = make(config, judge, ranks)
        passes: list[int] = []
        trainer.policy.family.denoiser.register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
        trainer.check()
        stats = [trainer.run_epoch()]
        if ranks.rank == 1:
            trainer.critic = Redness(failing=range(6), dimensions=config.dimensions)  # most are masked
        stats.append(trainer.run_epoch())
        trainer.check()
        folder = out.folder / f"{sharding}{ranks.rank}"
        if ranks.is_main:
            save_state(folder / "state", trainer.tensors(), trainer.state())
            save_policy(folder / "policy", trainer.policy)
        images = b"".join(image for item in judge.asked for image in item.images)
        frozen = [p for p in trainer.policy.family.denoiser.parameters() if not p.requires_grad]
        found = {
            "base_elements": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen),
            "stats": stats,
            "audits": [audit.model_dump() for audit in trainer.history],
            "images": hashlib.sha256(images).hexdigest(),
            "weights": [hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for p in trainer.sets.trainable],
            "files": [sha256_file(file) for file in sorted(files_below(folder))],
            "passes": dist.gather([len(passes)], ranks),
        }
        (out.folder / f"{sharding}{ranks.rank}.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker_main(train)
