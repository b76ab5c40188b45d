"""The rl worker: the DiffusionNFT loop. It speaks of latents, conditions and rewards, never of a model's name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from firm import dist
from firm.chat.journal import Journals, OpenChat, forgetful
from firm.config import RLConfig, SteeredRun
from firm.config.monitors import MonitorsConfig
from firm.config.reward import REWARD
from firm.critics.child import served
from firm.critics.judge import judging
from firm.critics.load import load_critic, trained_critic
from firm.dist import Ranks
from firm.film import FILM, Film
from firm.launch.job import worker_main
from firm.metrics import Board, MetricsLog, read_metrics
from firm.pace import Pace
from firm.policies.policy import Policy, save_policy
from firm.progress import Task
from firm.prompts import load_prompts
from firm.records import UserError
from firm.rl.audit import Audit, best, over_optimised
from firm.rl.auditor import Auditor
from firm.rl.monitors import alarms
from firm.rl.nft import old_decay
from firm.rl.rollout import sample_groups, score, with_advantages
from firm.rl.update import Updater
from firm.storage.artifacts import WORK, Output
from firm.storage.checkpoint import Checkpoints, load_optimizer, load_state, optimizer_tensors, save_state

POLICY = "policy"
METRICS = "metrics.jsonl"
AUDITS = "audits.jsonl"
COPIES = ("old", "ema", "best", "reference")
"""Values of the policy that are kept beside its own."""


class RLTrainer:
    """All state of RL that a resume needs, and one epoch of work."""

    def __init__(
        self,
        config: SteeredRun,
        critic_folder: Path | None,
        ranks: Ranks,
        start: Path | None = None,
        open_chat: OpenChat = forgetful,
    ) -> None:
        """Load policy and judges; everything starts at the base, or at the trained policy in the folder ``start``."""
        rl: RLConfig = config.rl
        self.config = config
        self.ranks = ranks
        self.policy = Policy(config.policy, ranks.device)
        self.sets = self.policy.train(rl.lora, COPIES, config.seed, start)
        if rl.sharding == "base":
            if config.auditor.num_images < ranks.size:
                what = "every rank takes part in an audit where the policy's base is sharded"
                raise UserError(what, "auditor.num_images", f"set at least {ranks.size}", usage=True)
            self.policy.shard(ranks)
        self.critic = load_critic(critic_folder, config.critic, ranks.device, open_chat)
        self.prompts = load_prompts(config.prompts, "train")
        self.auditor = Auditor(self.policy, self.critic, self.prompts, config, ranks, open_chat)
        self.updater = Updater(self.policy, rl, config.seed, ranks)
        self.pace = Pace()
        self.epoch = 0
        self.history: list[Audit] = []
        if rl.gradient_checkpointing:
            self.policy.family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    def run_epoch(self) -> dict[str, float | None]:
        """Rollout, update, refresh of the old policy."""
        c = self.config
        on_policy = old_decay(c.rl.decay, self.updater.steps) == 0  # at the last refresh, or nothing is trained yet
        with judging(self.critic) as critic:
            with self.pace.part("sampling"):
                groups = sample_groups(self.policy, self.prompts, c.rl, c.seed, self.epoch, self.ranks, critic)
            with self.pace.part("judging"):
                scored = score(critic, groups, c.reward)
        rollout = with_advantages(groups, *scored, c.rl, self.ranks)
        with self.pace.part("updating"):
            stats = self.updater.epoch(rollout, self.epoch, on_policy)
        self.sets.update_average("old", old_decay(c.rl.decay, self.updater.steps))
        self.epoch += 1
        return {**rollout.stats, **stats}

    @property
    def owes_check(self) -> bool:
        """Whether this epoch is to be audited and has not been."""
        due = self.epoch % self.config.auditor.every == 0 or self.epoch == self.config.rl.max_epochs
        return due and not self.is_audited

    @property
    def is_audited(self) -> bool:
        """Whether the last audit was of this epoch."""
        return bool(self.history) and self.history[-1].epoch == self.epoch

    @property
    def is_done(self) -> bool:
        """Whether all epochs are trained and audited, or the auditor says to stop."""
        if self.owes_check or not self.is_audited:
            return False
        stopped = self.config.auditor.stops and over_optimised(self.history, self.config) is not None
        return stopped or self.epoch == self.config.rl.max_epochs

    def check(self) -> None:
        """Audit, and remember the best."""
        with self.pace.part("audit"):
            self.history.append(self.auditor.check(self.epoch))
        if best(self.history).epoch == self.epoch:
            self.sets.copy("ema", "best")

    def choose(self) -> tuple[str, list[Audit]]:
        """The parameter set to keep, of the base, the best check's and the last, and the fresh audits that say so."""
        candidates = {best(self.history).epoch: "best", self.epoch: "ema", 0: "reference"}
        audits = self.auditor.choose(candidates)
        return candidates[audits[-1].epoch], audits

    def tensors(self) -> dict[str, Tensor]:
        """Parameter sets, that of the best check among them, and the optimizer."""
        return {**self.sets.tensors(), **optimizer_tensors(self.updater.optimizer, self.sets.names)}

    def state(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        history = [a.model_dump() for a in self.history]
        return {"epoch": self.epoch, "steps": self.updater.steps, "history": history}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`tensors` and :meth:`state`."""
        self.sets.load(tensors)
        load_optimizer(self.updater.optimizer, self.sets.names, tensors)
        self.epoch = state["epoch"]
        self.updater.steps = state["steps"]
        self.history = [Audit.model_validate(a) for a in state["history"]]


def train(request: dict[str, Any], inputs: Mapping[str, Path], out: Output) -> None:
    """Run epochs until the maximum or the auditor's stop; resume from a checkpoint; write the policy chosen then.

    What judges have answered since the checkpoint is not asked again; on another machine, up to the last epoch or
    check that came to its end.
    """
    config = SteeredRun.model_validate(request["config"])
    ranks = dist.start()
    start = inputs.get("last_policy")
    answers = f"{WORK}/answers-{ranks.rank}"
    critic = trained_critic(inputs)
    with (
        served(config.critic, critic, out.folder / WORK, ranks) as asked,
        Journals(out.folder / answers) as journals,
    ):
        config = config.model_copy(update={"critic": asked})
        trainer = RLTrainer(config, critic, ranks, start / "policy" if start else None, journals)
        _train(trainer, journals, answers, out)


def _train(trainer: RLTrainer, journals: Journals, answers: str, out: Output) -> None:
    config, ranks = trainer.config, trainer.ranks
    checkpoints = Checkpoints(out, config.rl.checkpoint_minutes)
    saved = checkpoints.last()
    if saved is not None:
        trainer.restore(*load_state(saved))
    film = Film(out.folder / FILM, len(trainer.history)) if ranks.is_main else None
    log = MetricsLog(out.folder / METRICS, Board(out, trainer.epoch + 1), trainer.epoch) if ranks.is_main else None
    lines: list[Mapping[str, Any]] = [*read_metrics(out.folder / METRICS)] if log else []
    task = Task("rl", "DiffusionNFT", config.rl.max_epochs, "epochs", trainer.epoch) if ranks.is_main else None
    while not trainer.is_done:
        if trainer.owes_check:
            trainer.check()
            if log and film:
                shown = trainer.auditor.shown
                film.add(trainer.epoch, ((item.prompt, item.images) for item in shown))
                log.board.show(trainer.epoch, "audit", [item.images[-1] for item in shown])
                log.board.write(trainer.epoch, trainer.pace.take())
        else:
            stats = trainer.run_epoch()
            if log:
                log.board.write(trainer.epoch, trainer.pace.take(config.rl.prompts_per_epoch * config.rl.group_size))
                raised = alarms([*lines, stats], config.rl.monitors)
                lines.append({**stats, "alarms": float(len(raised))})
                log.write(trainer.epoch, lines[-1])
        if task:
            task.advance(trainer.epoch - task.done, _note(lines, trainer.history, config.rl.monitors))
        out.publish(answers)
        regular = trainer.epoch % config.rl.checkpoint_epochs == 0 or trainer.epoch == config.rl.max_epochs
        if regular or trainer.is_done or checkpoints.overdue():
            _save(trainer, checkpoints)
            journals.forget()
    kept, fresh = trainer.choose()
    if log:
        log.close()
        # Sorted, since a checkpoint sorts keys, too, and a resumed run must write the same bytes.
        audits = [json.dumps(audit.model_dump(), sort_keys=True) for audit in (*trainer.history, *fresh)]
        (out.folder / AUDITS).write_text("\n".join(audits) + "\n")
        with trainer.policy.using(kept):
            save_policy(out.folder / POLICY, trainer.policy)


def _save(trainer: RLTrainer, checkpoints: Checkpoints) -> None:
    """Save a checkpoint; an epoch that is also audited has one before and one after: an audit that fails is cheap."""
    if trainer.ranks.is_main:
        audited = "-audited" if trainer.is_audited else ""
        name = f"epoch-{trainer.epoch}{audited}"
        save_state(checkpoints.folder / name, trainer.tensors(), trainer.state())
        checkpoints.keep(name, METRICS, FILM)
    dist.barrier()  # no rank forgets its judges' answers before the checkpoint is there


def _note(lines: Sequence[Mapping[str, Any]], history: Sequence[Audit], monitors: MonitorsConfig) -> str:
    last, base = (audit.mean("auditor", REWARD) for audit in (history[-1], history[0]))
    audited = f"by the auditor's scores {last:.3f} (base {base:.3f})"
    if not lines:
        return audited
    reward = "no valid judgement" if lines[-1]["reward"] is None else f"reward {lines[-1]['reward']:.3f}"
    return f"{reward}, {audited}" + "".join(f"; ALARM: {alarm.text}" for alarm in alarms(lines, monitors))


if __name__ == "__main__":
    worker_main(train)
