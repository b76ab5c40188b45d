"""RL learns: the reward rises, resumes are exact, and the number of processes does not matter."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import ALONE, CPU, Redness, python_path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from firm import dist, metrics
from firm.config import Gate, RewardConfig, RLConfig, Rule, RunConfig
from firm.config.launch import LocalLaunch
from firm.config.loading import load_config
from firm.critics.judge import JudgeInput
from firm.dist import Ranks
from firm.launch.job import TrainingJob, worker_main
from firm.launch.launcher import launch
from firm.policies.policy import load_policy, save_policy
from firm.records import Assessment, Invalid, UserError
from firm.rl import auditor as rl_auditor
from firm.rl import train as rl_train
from firm.rl.train import RLTrainer
from firm.storage.artifacts import BOARD, Output
from firm.storage.checkpoint import load_state, save_state

EPOCHS = 14
GAPS = ["instruction_following.skill_low", "instruction_following.pairwise"]
RUBRICS = {"instruction_following": "short_instruction_following"}


class Failing:
    """A critic that cannot be reached."""

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        return [{"instruction_following": Invalid(reason="request_failed")} for _ in items]


def settings(**changes: Any) -> RunConfig:
    """A run of a few epochs, judged by redness."""
    config = load_config("gen-shapes")
    few: dict[str, Any] = {
        "prompts_per_epoch": 4, "group_size": 8, "max_epochs": 8, "num_inference_steps": 4, "batch_size": 32,
        "learning_rate": 2e-3, "inner_epochs": 2, "timesteps": "uniform", "num_timesteps": 1, "kl_weight": 0,
        "adv_clip_max": 1, "solver": "euler",
    }  # fmt: skip
    critic = config.critic.model_copy(update={"rubrics": RUBRICS})
    gate = Gate(rules=[Rule(metric="coverage", at_least=0)], accept_gaps=GAPS)
    bench = config.bench.model_copy(update={"gate": gate})
    auditor = config.auditor.model_copy(update={"num_images": 4})
    update = {"rl": RLConfig(**{**few, **changes}), "critic": critic, "bench": bench, "auditor": auditor}
    return config.model_copy(
        update={**update, "reward": RewardConfig(formula="base_only", base="instruction_following")}
    )


def make(config: RunConfig, ranks: Ranks = ALONE, sign: float = 1.0) -> RLTrainer:
    with patch.object(rl_train, "load_critic", lambda *_: Redness(sign)):  # no critic was trained
        trainer = RLTrainer(config, Path(), ranks)
    return trainer


def rewards(epochs: int, sign: float = 1.0, **changes: Any) -> list[float]:
    """Redness in [0, 1] of each epoch's rollout."""
    trainer = make(settings(**changes), sign=sign)
    found = [trainer.run_epoch()["reward"] for _ in range(epochs)]
    return found if sign > 0 else [1 - r for r in found]


def all_tensors(trainer: RLTrainer) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in trainer.tensors().items()}


def gain(values: Sequence[float], still: Sequence[float]) -> float:
    """Over the untrained policy on the same prompts and noise, in the last epochs."""
    return float(np.mean(values[-4:]) - np.mean(still[-4:]))


@pytest.fixture(scope="module")
def still() -> list[float]:
    """What the policy earns when it cannot learn."""
    return rewards(EPOCHS, learning_rate=1e-12)


def test_without_a_learning_rate_the_reward_stays(still: list[float]) -> None:
    assert rewards(3, learning_rate=1e-13) == pytest.approx(still[:3], abs=1e-4)


def test_the_reward_rises_and_falls_with_the_opposite(still: list[float]) -> None:
    up, down = gain(rewards(EPOCHS), still), gain(rewards(EPOCHS, sign=-1.0), still)
    assert up > 0.015 and down < -0.01, f"{up:.3f} and {down:.3f}"


def test_a_lora_learns_too(still: list[float]) -> None:
    lora: Any = {"rank": 8, "alpha": 16}
    assert gain(rewards(EPOCHS, lora=lora, learning_rate=1e-2), still) > 0.015


@pytest.mark.parametrize("changes", [{}, {"kl_weight": 0.01, "lora": {"rank": 2, "alpha": 4}}], ids=["full", "lora"])
def test_a_resumed_run_equals_the_uninterrupted_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(group_size=3, max_epochs=4, **changes)
    whole, first, second = (make(config) for _ in range(3))
    for _ in range(2):
        whole.run_epoch()
        first.run_epoch()
    whole.check()
    first.check()
    save_state(tmp_path / "c", first.tensors(), first.state())
    torch.manual_seed(99)  # nothing may draw from the global generator
    second.restore(*load_state(tmp_path / "c"))
    assert second.epoch == 2 and second.history == first.history
    for _ in range(2):
        assert second.run_epoch() == whole.run_epoch()
    second.check()
    whole.check()
    a, b = all_tensors(whole), all_tensors(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert whole.state() == second.state()


def test_the_old_policy_follows_after_the_epoch() -> None:
    trainer = make(settings(group_size=3, decay="copy"))
    start = [t.clone() for t in trainer.sets.sets["old"]]
    trainer.run_epoch()
    old, live = trainer.sets.sets["old"], trainer.sets.trainable
    assert all(torch.equal(a, b) for a, b in zip(old, live, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(old, start, strict=True))
    slow = make(settings(group_size=3))
    slow.run_epoch()
    for found, a, b in zip(slow.sets.sets["old"], start, slow.sets.trainable, strict=True):
        torch.testing.assert_close(found, 0.002 * a + 0.998 * b)  # two steps: decay 0.002


@pytest.mark.parametrize(("decay", "passes"), [("copy", [1, 1]), ("linear_to_0.5", [1, 2])])
def test_the_old_policy_is_not_run_where_it_is_the_policy(decay: str, passes: list[int]) -> None:
    """It is before anything is trained, and after a refresh that copies."""
    trainer = make(settings(decay=decay, inner_epochs=1, group_size=2))
    with_gradients: list[bool] = []
    found = []
    for _ in passes:
        handle = trainer.policy.family.denoiser.register_forward_pre_hook(
            lambda *_: with_gradients.append(torch.is_grad_enabled())
        )
        trainer.run_epoch()
        handle.remove()
        found.append(len(with_gradients) - 4)  # 4 steps of the sampler, with all samples at once
        assert with_gradients.count(True) == 1
        with_gradients.clear()
    assert found == passes


def test_the_average_is_audited_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(settings(group_size=3, max_epochs=1))
    trainer.run_epoch()
    with torch.no_grad():  # the three differ
        for name, factor in (("ema", 1.01), ("old", 0.99)):
            for tensor in trainer.sets.sets[name]:
                tensor.mul_(factor)
    used: list[str] = []
    using = trainer.policy.using
    monkeypatch.setattr(trainer.policy, "using", lambda name: used.append(name) or using(name))
    trainer.check()
    assert used == ["ema"]
    sets = trainer.sets.sets
    assert all(torch.equal(a, b) for a, b in zip(sets["best"], sets["ema"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(sets["best"], sets["old"], strict=True))


def test_candidates_are_audited_on_fresh_prompts_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base, the policy of the best check and the last one; every check has the same prompts and noise."""
    trainer = make(settings(group_size=3, max_epochs=3))
    start = [t.clone() for t in trainer.sets.trainable]
    drawn: list[tuple[str, Tensor]] = []
    noise_for = rl_auditor.noise_for

    def record(shape: tuple[int, ...], seed: int, purpose: str, indices: Sequence[int]) -> Tensor:
        drawn.append((purpose, noise_for(shape, seed, purpose, indices)))
        return drawn[-1][1]

    monkeypatch.setattr(rl_auditor, "noise_for", record)
    audits = {}
    for rewards in ((0.5,), (0.9,), (0.7,)):
        trainer.check()
        found = trainer.history[-1]
        audits[trainer.epoch] = found
        scores = {**found.auditor, "reward": rewards * len(found.prompts)}
        trainer.history[-1] = found.model_copy(update={"auditor": scores})
        if trainer.epoch < 2:
            trainer.run_epoch()
    used: dict[int, str] = {}
    monkeypatch.setattr(trainer.auditor, "choose", lambda candidates: used.update(candidates) or [audits[1]])
    assert trainer.choose() == ("best", [audits[1]])
    assert used == {0: "reference", 1: "best", 2: "ema"}
    assert all(torch.equal(a, b) for a, b in zip(trainer.sets.sets["reference"], start, strict=True))
    fresh = [trainer.auditor.check(0, "reference", sample) for sample in ("check", "choice", "report")]
    assert all(audit.prompts == audits[0].prompts for audit in (audits[1], audits[2], fresh[0]))
    assert fresh[0] == audits[0]
    assert len({audit.prompts for audit in fresh}) == 3
    assert all(torch.equal(noise, drawn[0][1]) for _, noise in drawn[:4])
    assert not any(torch.equal(noise, drawn[0][1]) for _, noise in drawn[4:]) and len(drawn) == 6
    assert len(set(audits[0].prompts)) == 2  # of four images


def test_a_policy_that_only_the_critic_likes_is_stopped_and_not_kept() -> None:
    """The auditor likes what the critic dislikes."""
    config = settings(max_epochs=8, adv_clip_max=5)
    often = config.auditor.model_copy(update={"num_images": 64, "every": 1, "window": 2})
    trainer = make(config.model_copy(update={"auditor": often}))
    trainer.auditor.judge = Redness(-1)
    trainer.check()
    while not trainer.is_done:
        trainer.run_epoch()
        trainer.check()
    assert trainer.epoch < 8
    _, audits = trainer.choose()
    kept, last = audits[-1], trainer.history[-1]
    assert kept.epoch < last.epoch and kept.mean("auditor", "reward") > last.mean("auditor", "reward")


@pytest.mark.parametrize("minutes", [30, 1e-9], ids=["by epochs", "by time"])
def test_an_audit_that_fails_costs_nothing_but_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float
) -> None:
    """The audit after the second epoch fails; what was trained before it is not trained again."""
    epochs = {30: 2, 1e-9: 50}[minutes]
    config = settings(group_size=3, max_epochs=3, checkpoint_epochs=epochs, checkpoint_minutes=minutes)
    config = config.model_copy(update={"auditor": config.auditor.model_copy(update={"every": 2})})
    request = {"config": config.model_dump(mode="json")}
    check, run_epoch, trained = rl_auditor.Auditor.check, RLTrainer.run_epoch, []

    def fail(self: rl_auditor.Auditor, epoch: int, *which: str) -> Any:
        if epoch == 2:
            raise UserError("the auditor is gone", "there")
        return check(self, epoch, *which)

    monkeypatch.setattr(metrics, "PUBLISH_EVERY_S", 0)
    monkeypatch.setattr(rl_train, "load_critic", lambda *_: Redness())
    monkeypatch.setattr(RLTrainer, "run_epoch", lambda self: trained.append(self.epoch) or run_epoch(self))
    rl_train.train(request, {"critic": Path()}, Output.open(str(tmp_path / "whole")))
    out = Output.open(str(tmp_path / "parts"))
    with monkeypatch.context() as patched, pytest.raises(UserError, match="gone"):
        patched.setattr(rl_auditor.Auditor, "check", fail)
        rl_train.train(request, {"critic": Path()}, out)
    rl_train.train(request, {"critic": Path()}, out)
    assert trained == [0, 1, 2] * 2
    for name in ("metrics.jsonl", "audits.jsonl"):
        assert (out.folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    weights = "policy/transformer/diffusion_pytorch_model.safetensors"
    assert (out.folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    board = EventAccumulator(str(out.folder / BOARD)).Reload()
    assert [event.step for event in board.Scalars("reward")] == [1, 2, 3]  # of each epoch one point, and none is lost


def test_a_further_round_starts_from_the_kept_policy(tmp_path: Path) -> None:
    config = settings(group_size=3, max_epochs=1, learning_rate=1e-12)
    first = make(config)
    with torch.no_grad():
        for tensor in first.sets.trainable:
            tensor.mul_(1.05)
    save_policy(tmp_path / "last" / "policy", first.policy)
    out = Output.open(str(tmp_path / "out"))
    with patch.object(rl_train, "load_critic", lambda *_: Redness()):
        rl_train.train(
            {"config": config.model_dump(mode="json")}, {"critic": Path(), "last_policy": tmp_path / "last"}, out
        )
    kept = dict(load_policy(out.folder / "policy", CPU).family.denoiser.named_parameters())
    for name, tensor in zip(first.sets.names, first.sets.trainable, strict=True):
        torch.testing.assert_close(kept[name], tensor.detach(), atol=1e-6, rtol=0)


# ---- processes


@pytest.fixture
def worker_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``python -m test_rl_learns`` find this file and what it shares."""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", python_path(here, here.parent))
    monkeypatch.delenv("FIRM_LIFELINE_PID", raising=False)


def job(config: RunConfig, **request: Any) -> TrainingJob:
    """A job of the worker at the end of this file."""
    return TrainingJob("run", "rl", Path(__file__).stem, {"config": config.model_dump(mode="json"), **request}, {})


@pytest.mark.usefixtures("worker_path")
def test_processes_share_an_audit_and_wait_for_a_slow_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rank's auditor takes longer than a step may; both get the audit that one process makes."""
    monkeypatch.setenv("STEP_S", "3")
    config = settings(group_size=4)
    config = config.model_copy(update={"auditor": config.auditor.model_copy(update={"num_images": 5})})
    launch(job(config, epochs=0, slow_s=6), Output.open(str(tmp_path)), LocalLaunch(num_workers=2))
    first, second = (json.loads((tmp_path / f"audit{rank}.json").read_text()) for rank in range(2))
    assert (first["judged"], second["judged"]) == (2, 3) and first["audit"] == second["audit"]
    every = first["audit"]["critic"]["reward"]
    assert first["few"] == second["few"] == every[:1], "the first rank has no image, and takes part"
    assert first["failing"] == second["failing"] == [*every[:2], None, None, None]
    trainer = make(config)
    trainer.auditor.judge = Redness()
    trainer.check()
    alone = trainer.history[0].model_dump(mode="json")
    for who in ("critic", "auditor"):
        for measure, values in alone.pop(who).items():
            assert first["audit"][who][measure] == pytest.approx(values, abs=0.01)
        first["audit"].pop(who)
    assert first["audit"] == alone


@pytest.mark.usefixtures("worker_path")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    found, stats = {}, {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        config = settings(group_size=4, weight_decay=0, learning_rate=1e-4, kl_weight=0.01)
        launch(job(config, epochs=2), Output.open(str(folder)), LocalLaunch(num_workers=workers))
        ranks = [load_file(folder / f"rank{rank}.safetensors") for rank in range(workers)]
        assert all(torch.equal(t, ranks[-1][k]) for k, t in ranks[0].items())
        found[workers], stats[workers] = ranks[0], json.loads((folder / "stats.json").read_text())
    one, two, moves = found[1], found[2], []
    for key, tensor in one.items():
        if key.startswith(("policy/", "old/", "ema/")):
            # Adam divides by the gradient's size: where that is rounding, so is the step. Hence whole tensors.
            moves.append((tensor - one["reference/" + key.partition("/")[2]]).norm().item())
            apart = (two[key] - tensor).norm().item()
            assert apart <= 0.02 * moves[-1], f"{key}: {apart} apart after a way of {moves[-1]}"
    assert max(moves) > 1e-3
    for alone, together in zip(stats[1], stats[2], strict=True):
        assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)


@pytest.mark.usefixtures("worker_path")
def test_a_rank_without_a_valid_judgement_takes_the_step_of_the_other(tmp_path: Path) -> None:
    config = settings(group_size=4, learning_rate=1e-4, kl_weight=0.01, inner_epochs=1)
    launch(job(config, epochs=1, failing_rank=1), Output.open(str(tmp_path)), LocalLaunch(num_workers=2))
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    moved = [
        key for key in first if key.startswith("policy/") and not torch.equal(first[key], first["reference/" + key[7:]])
    ]
    assert moved
    [stats] = json.loads((tmp_path / "stats.json").read_text())
    assert stats["invalid_judgements"] == 8 and stats["loss"] > 0


class Slow(Redness):
    """The judge of a rank that waits before it answers."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        time.sleep(self.seconds)
        return super().judge(items)


def audited(trainer: RLTrainer, num_images: int) -> list[float | None]:
    """The critic's rewards of so many images."""
    config = trainer.auditor.config
    few = config.auditor.model_copy(update={"num_images": num_images})
    trainer.auditor.config = config.model_copy(update={"auditor": few})
    return list(trainer.auditor.check(0).critic["reward"])


def train(request: dict[str, Any], inputs: Mapping[str, Path], out: Output) -> None:
    """The worker of the tests above."""
    ranks = dist.start()
    trainer = make(RunConfig.model_validate(request["config"]), ranks)
    if ranks.rank == request.get("failing_rank"):
        trainer.critic = Failing()
    if "slow_s" in request:
        trainer.auditor.judge = judge = Slow(request["slow_s"] * ranks.rank)
        trainer.check()
        seen = {"audit": trainer.history[0].model_dump(mode="json"), "judged": len(judge.asked)}
        judge.seconds = 0
        seen["few"] = audited(trainer, 1)
        if ranks.rank == 1:
            trainer.auditor.critic = Failing()
        seen["failing"] = audited(trainer, 5)
        (out.folder / f"audit{ranks.rank}.json").write_text(json.dumps(seen))
    stats = [trainer.run_epoch() for _ in range(request["epochs"])]
    save_file(
        {k: t.contiguous() for k, t in all_tensors(trainer).items()}, out.folder / f"rank{ranks.rank}.safetensors"
    )
    dist.barrier()  # the first rank hands over what there is
    if ranks.is_main:
        (out.folder / "stats.json").write_text(json.dumps(stats))


if __name__ == "__main__":
    dist.STEP = timedelta(seconds=float(os.environ.get("STEP_S", "600")))
    worker_main(train)
