"""A plan as people and as machines read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from firm.plan.assumptions import CARDS, GB, Assumptions, StagePlan

PARTS = ("weights", "gradients", "states", "buckets", "activations", "logits", "kv")
"""Of a GPU's memory, in the order of the table."""
WORDS = ("stage", "when", "of it", "role", "who")
"""Columns of words."""
WIDTH = 132


def as_json(plans: Sequence[StagePlan], given: Assumptions) -> dict[str, Any]:
    """Everything, in bytes, FLOPs and hours."""
    return {
        "assumptions": asdict(given),
        "stages": [
            {
                "stage": plan.stage,
                "note": plan.note,
                "gpus": plan.gpus,
                "phases": [vars(phase) | {"cost": asdict(phase.cost)} for phase in plan.phases],
                "calls": [asdict(calls) for calls in plan.calls],
                "checkpoint": plan.checkpoint,
                "fullest": plan.fullest.name if plan.fullest else None,
                "bytes_a_gpu": plan.bytes_a_gpu,
                "fits": {str(card): plan.fits(card) for card in CARDS},
                "flops": plan.flops,
                "hours": plan.hours(given),
                "gpu_hours": plan.gpu_hours(given),
            }
            for plan in plans
        ],
    }


def show(plans: Sequence[StagePlan], given: Assumptions) -> None:
    """Print tables of memory, of work and of calls, and what they take for granted."""
    console = Console(width=WIDTH, highlight=False)
    for table in (_memory(plans), _work(plans, given), _calls(plans)):
        console.print(table)
    console.print(
        f"Hours at {given.mfu:.0%} of {given.tflops:g} TFLOPS, and where token follows token at {given.mbu:.0%} of "
        f"{given.bandwidth:g} GB/s: assumed, not measured; calls to others come on top. Prompts of "
        f"{given.prompt_tokens} tokens, answers of {given.answer_tokens}.\n"
        "Memory is what tensors take: CUDA itself, its libraries and fragments want another 1 to 3 GB."
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in WORDS else "right")
    return table


def _memory(plans: Sequence[StagePlan]) -> Table:
    names = ("KV" if part == "kv" else part for part in PARTS)
    table = _table("GB of a GPU at its fullest", "stage", "when", *names, "total", "fits on")
    for plan in plans:
        if plan.fullest is not None:
            parts = (plan.fullest.memory.get(part, 0) for part in PARTS)
            fitting = next((f"{card} GB" for card in CARDS if plan.fits(card)), "none")
            table.add_row(
                plan.stage, escape(plan.fullest.name), *map(_gigabytes, parts), _gigabytes(plan.bytes_a_gpu), fitting
            )
    return table


def _work(plans: Sequence[StagePlan], given: Assumptions) -> Table:
    table = _table("Work", "stage", "of it", "GPUs", "PFLOP", "hours", "GPU-hours", "GB a checkpoint")
    for plan in plans:
        hours, held = plan.hours(given), plan.gpu_hours(given)
        checkpoint = _gigabytes(plan.checkpoint) if plan.checkpoint else ""
        table.add_row(
            plan.stage, plan.note, str(plan.gpus), *map(_number, (plan.flops / 1e15, hours, held)), checkpoint
        )
        for phase in (p for p in plan.phases if p.cost.flops):
            hours = phase.cost.hours(given)
            work = phase.cost.flops * phase.gpus / 1e15
            table.add_row("", escape(phase.name), str(phase.gpus), _number(work), _number(hours))
    total = sum(plan.gpu_hours(given) for plan in plans)
    table.add_row("all", "", "", *map(_number, (sum(p.flops for p in plans) / 1e15, _hours(plans, given), total)))
    return table


def _hours(plans: Sequence[StagePlan], given: Assumptions) -> float:
    return sum(plan.hours(given) for plan in plans)


def _calls(plans: Sequence[StagePlan]) -> Table:
    table = _table("Calls to others", "stage", "role", "who", "questions", "tokens in", "tokens out")
    for plan in plans:
        for calls in plan.calls:
            numbers = (f"{number:,}" for number in (calls.number, calls.tokens_in, calls.tokens_out))
            table.add_row(plan.stage, calls.role, escape(calls.who), *numbers)
    return table


def _gigabytes(size: int) -> str:
    return _number(size / GB)


def _number(value: float) -> str:
    """With two digits at least, and none of what is nothing."""
    if not value:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
