"""The sft worker: transformers.Trainer over (messages, images) examples, answers only in the loss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from firm import dist
from firm.config import CriticConfig, SFTConfig
from firm.critics.answers import parse_answer, parse_score_first, write_answer
from firm.critics.encoder import Batch, Encoder
from firm.critics.local import load_model, load_processor
from firm.critics.rubrics import load_rubric
from firm.launch.job import worker_main
from firm.progress import Task
from firm.records import SCORES, Example, Invalid, UserError
from firm.seeds import seed_for
from firm.sft.ahead import Ahead, one_thread
from firm.sft.held_out import HeldOut
from firm.sft.loss import only_answers
from firm.sft.optimizer import Muon
from firm.sft.run import EVAL
from firm.sft.sharding import in_float32, is_sharded, shard, unsharded
from firm.sft.watched import Watched
from firm.storage.artifacts import Output
from firm.storage.checkpoint import Checkpoints, load_optimizer, optimizer_tensors
from firm.storage.inputs import uri_of
from firm.storage.parts import Parts, local, part_name, write_part
from firm.storage.table import Table, shards_in

SCHEDULER = "scheduler.json"
STATE = "trainer_state.json"  # the Trainer's name


class Collator:
    """Examples -> padded batch with labels on the answer tokens only."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Encode rows of ``messages`` (user, assistant) and ``images`` ({"bytes": PNG})."""
        texts = [r["messages"][0]["content"] for r in rows]
        images = [[i["bytes"] for i in r["images"]] for r in rows]
        answers = self.encoder.answers([r["messages"][1]["content"] for r in rows])
        return self.encoder.append(self.encoder.questions(texts, images), answers)


def place(model: torch.nn.Module) -> tuple[int, int]:
    """Which part of a checkpoint has what this rank holds of the model, counted from 0, and the number of parts."""
    ranks = dist.start()
    return (ranks.rank, ranks.size) if is_sharded(model) else (0, 1)


class PlainTrainer(Trainer):
    """Trainer of a model that is sharded or not, whose checkpoints hold no pickle.

    What trains and its moments are in parts (see `firm.storage.parts`), schedule and state in JSON. Random state is not
    saved because nothing in the step draws from it: the order of the data has its own seed.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._epoch: Iterator[Batch] | None = None
        only_answers(self.model)
        self.model_accepts_loss_kwargs = True  # have the answers' tokens counted
        if is_sharded(self.model):  # so that the Trainer makes no copies on the ranks of it
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train; nothing is prepared any more when it ends, however it does."""
        self._thread = one_thread()
        try:
            return super().train(*arguments, **options)
        finally:
            self._thread.shutdown(cancel_futures=True)

    def get_train_dataloader(self) -> Any:
        """Batches wait on the host for their turn: the Trainer moves them when they are computed."""
        loader = super().get_train_dataloader()
        loader.device = None
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        """The batches of a step, prepared by a thread while the one before was computed."""
        if epoch_iterator is not self._epoch:
            self._epoch = epoch_iterator
            self._ahead = Ahead(epoch_iterator, self.args.gradient_accumulation_steps, self._thread)
        return super().get_batch_samples(self._ahead, num_batches, device)

    def compute_loss(
        self, model: Any, inputs: Batch, *_: Any, num_items_in_batch: Any = None, **__: Any
    ) -> torch.Tensor:
        """Mean over the tokens of all answers of a step, whichever rank and micro-batch has them."""
        loss: torch.Tensor = model(**inputs).loss
        return loss * self.accelerator.num_processes / num_items_in_batch  # gradients are averaged over ranks

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Judge the `HeldOut` examples; the numbers go where the loss goes."""
        with self.accelerator.autocast():
            numbers: dict[str, float] = self.eval_dataset.judge(self.model)
        self.log(dict(numbers))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, numbers)
        return numbers

    def _names(self) -> list[str]:
        names = {id(p): n for n, p in self.model.named_parameters()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def _trained(self) -> dict[str, torch.Tensor]:
        return {f"model/{n}": p for n, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        pass  # with the optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, (index, number) = Path(output_dir), place(self.model)
        if dist.start().rank == index:
            write_part(folder, index, number, self._trained() | optimizer_tensors(self.optimizer, self._names()))
        if self.args.should_save:
            state = {k: v for k, v in self.lr_scheduler.state_dict().items() if isinstance(v, int | float | list)}
            (folder / SCHEDULER).write_text(json.dumps(state))

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        parts = Parts(Path(checkpoint), dist.start())
        for name, parameter in self._trained().items():
            local(parameter.detach()).copy_(parts.read(name, parameter))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            parts, parameters = Parts(Path(checkpoint), dist.start()), dict(self.model.named_parameters())
            states = [name for name in parts.names() if name.startswith("optimizer/")]
            held = {name: parts.read(name, parameters[name.split("/", 2)[2]]) for name in states}
            load_optimizer(self.optimizer, self._names(), held)
            self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / SCHEDULER).read_text()))
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def _save_rng_state(self, output_dir: str) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass


class Reporter(TrainerCallback):
    """Progress while training, and checkpoints that last."""

    task: Task | None = None

    def __init__(self, checkpoints: Checkpoints) -> None:
        """``checkpoints`` takes each one that the Trainer has written."""
        self.checkpoints = checkpoints

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step; ask for a checkpoint where the last one is too long ago."""
        control.should_save |= self.checkpoints.overdue()
        if not state.is_world_process_zero:
            return
        if self.task is None:
            self.task = Task("sft", "training the critic", state.max_steps, "steps", done=state.global_step - 1)
        last = next((line["loss"] for line in reversed(state.log_history) if "loss" in line), None)
        self.task.advance(1, f"loss {last:.3f}" if last is not None else "")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make this rank's files of the checkpoint durable while training goes on; older ones go."""
        ranks, (index, number) = dist.start(), place(kwargs["model"])
        part = [part_name(index, number)] if ranks.rank == index else []
        self.checkpoints.begin(f"checkpoint-{state.global_step}", *part, *([SCHEDULER, STATE] if ranks.is_main else []))


def check_answers(encoder: Encoder, critic: CriticConfig) -> None:
    """Check that the critic's tokenizer can write the answers that it is to learn.

    Raises:
        UserError: A verdict cannot be read any more when an answer has gone through the tokenizer (exit code 2).
    """
    for form in {load_rubric(name).score_format for name in critic.rubrics.values()}:
        for score in SCORES:
            answer = write_answer(score, "", critic.answer_style, form)
            written = encoder.read(encoder.answers([answer])[0])
            first = critic.answer_style == "score_first"
            outcome = parse_score_first(written) if first else parse_answer(written, form)
            if isinstance(outcome, Invalid) or outcome.score != score:
                what = f"the critic's tokenizer cannot write its answers: {answer!r} becomes {written!r}"
                fix = "take a model that knows these characters, or another answer_style"
                raise UserError(what, f"critic.model ({critic.model}), critic.answer_style", fix, usage=True)


def prepare(critic: CriticConfig, sft: SFTConfig, seed: int, start: Path | None = None) -> PreTrainedModel:
    """The model to train, whole or frozen under a LoRA: a trained critic in the folder ``start``, or the critic's."""
    model = load(critic, sft, seed, start)
    in_float32(model)
    return model


def load(critic: CriticConfig, sft: SFTConfig, seed: int, start: Path | None = None) -> PreTrainedModel:
    """The same with all weights, but for a LoRA, in the critic's dtype."""
    model = load_model(critic, str(start or critic.model))
    vision = model.get_encoder("image")
    vision.requires_grad_(sft.train_vision)
    if sft.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    frozen = () if sft.train_vision else set(vision.modules())
    adapter = LoraConfig(
        r=sft.lora.rank,
        lora_alpha=sft.lora.alpha,
        target_modules="all-linear",
        exclude_modules=[name for name, module in model.named_modules() if module in frozen] or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(seed, "lora"))
        return get_peft_model(model, adapter)


def arguments(critic: CriticConfig, sft: SFTConfig, seed: int, folder: Path) -> TrainingArguments:
    """Our settings as the Trainer's arguments; it writes its checkpoints into ``folder``."""
    made = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=sft.batch_size,
        gradient_accumulation_steps=sft.gradient_accumulation,
        num_train_epochs=sft.epochs,
        max_steps=sft.max_steps or -1,
        learning_rate=sft.learning_rate,
        lr_scheduler_type=sft.lr_scheduler,
        lr_scheduler_kwargs=dict(sft.lr_scheduler_kwargs) or None,
        warmup_steps=sft.warmup_ratio,
        weight_decay=sft.weight_decay,
        adam_beta2=sft.adam_beta2,
        max_grad_norm=sft.max_grad_norm,
        average_tokens_across_devices=True,
        gradient_checkpointing=sft.gradient_checkpointing,
        bf16=critic.dtype == "bfloat16",
        seed=seed,
        data_seed=seed,
        save_strategy="steps",
        save_steps=sft.checkpoint_steps,
        logging_steps=1,
        eval_strategy="steps" if sft.eval_steps else "no",
        eval_steps=sft.eval_steps or None,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # A process has one GPU. With more in sight the Trainer would split batches itself, and images from their texts.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def train(request: dict[str, Any], inputs: Mapping[str, Path], out: Output) -> None:
    """Train, resume where a checkpoint is, and save the critic as a plain model folder."""
    critic = CriticConfig.model_validate(request["critic"])
    sft = SFTConfig.model_validate(request["sft"])
    encoder = Encoder(load_processor(critic.model, critic.max_pixels))
    check_answers(encoder, critic)
    checkpoints = Checkpoints(out, sft.checkpoint_minutes)
    start = inputs.get("last_critic")
    origin = (critic, sft, request["seed"], start / "critic" if start else None)
    ranks = dist.start()
    if sft.sharding == "full":
        model = load(*origin)
        shard(model, getattr(torch, critic.dtype), ranks)
    else:
        model = prepare(*origin)
    data = uri_of(inputs, "data")
    trainer = PlainTrainer(
        model=model,
        args=arguments(critic, sft, request["seed"], checkpoints.folder),
        data_collator=Collator(encoder),
        train_dataset=Table(shards_in(data, "train"), Example, ("messages", "images")),
        eval_dataset=HeldOut(data, critic, sft.eval_examples, request["seed"]) if sft.eval_steps else None,
        callbacks=[Reporter(checkpoints), Watched(out)],
        optimizers=(Muon(model, sft) if sft.optimizer == "muon" else None, None),
    )
    trainer.remove_callback(PrinterCallback)
    last = checkpoints.last()
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    checkpoints.finish()
    trained = unsharded(trainer.model, lambda: load(*origin), ranks)
    if trained is not None:
        _save(trained, encoder, critic, sft, out.folder / "critic")
        _save_curve(trainer.state.log_history, out.folder / "metrics.jsonl")


def _save(model: Any, encoder: Encoder, critic: CriticConfig, sft: SFTConfig, folder: Path) -> None:
    model = model.merge_and_unload() if sft.lora else model
    model.to(getattr(torch, critic.dtype)).save_pretrained(folder)
    encoder.processor.save_pretrained(folder)


def _save_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    lines: dict[int, dict[str, Any]] = {}
    for line in history:
        kept = {k: line[k] for k in sorted(line) if k.startswith(EVAL)}
        if "loss" in line:
            kept = {k: line[k] for k in ("step", "loss", "grad_norm", "learning_rate")}
        lines.setdefault(line["step"], {}).update(kept)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines.values() if "loss" in line))


if __name__ == "__main__":
    worker_main(train)
