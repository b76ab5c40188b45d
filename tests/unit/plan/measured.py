"""What really happens on a CPU: bytes of its allocator, and FLOPs; and random models of a medium size."""

import gc
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from firm.config import PolicyConfig
from firm.shapes.models import WEIGHTS

TOLERANCE = 0.1
aten = torch.ops.aten


def forward_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (3 * width + 2 * value[3])


ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
}
"""torch has formulas for the attention of GPUs only."""


def flops_of(work: Callable[[], object]) -> int:
    """FLOPs of some work, counted while it is done."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        work()
    return int(counter.get_total_flops())


def most_allocated(work: Callable[[], object]) -> int:
    """Most bytes that the CPU's allocator had given out at once during some work, beyond what it had before."""
    gc.collect()  # what earlier work left would be given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def near(what: str, planned: float, measured: float) -> None:
    """What is planned is at most a tenth from what is measured; `pytest -s` shows how far."""
    assert measured > 0
    print(f"\n{what}: planned {planned:,.0f}, measured {measured:,.0f}, {planned / measured - 1:+.1%}", end="")
    assert abs(planned / measured - 1) <= TOLERANCE, f"{what}: planned {planned:,.0f}, measured {measured:,.0f}"


def slowly(cases: Iterable[tuple[object, ...]]) -> list[Any]:
    """Cases that are part of `make test-endurance` only."""
    return [pytest.param(*case, marks=pytest.mark.endurance) for case in cases]


def medium_critic(folder: Path) -> Path:
    """A critic of 27 M parameters with the tokenizer of the tiny one, and groups of heads that share keys."""
    shutil.copytree(WEIGHTS / "critic", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64,
        "rope_parameters": config["text_config"]["rope_parameters"] | {"mrope_section": [12, 10, 10]},
    }  # fmt: skip
    config["vision_config"] |= {
        "hidden_size": 320, "intermediate_size": 960, "depth": 5, "num_heads": 5, "out_hidden_size": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    made = AutoConfig.from_pretrained(folder)
    AutoModelForImageTextToText.from_config(made, dtype=torch.float32).save_pretrained(folder)
    return folder


def medium_policy(folder: Path, dtype: str = "float32") -> PolicyConfig:
    """A generator with a transformer of 34 M parameters, with dual attention, and the rest of the tiny one."""
    shutil.copytree(WEIGHTS / "base", folder)
    shutil.rmtree(folder / "transformer")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=8, out_channels=8, num_layers=8, attention_head_dim=48,
        num_attention_heads=8, joint_attention_dim=96, caption_projection_dim=384, pooled_projection_dim=96,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0, 1, 2),
    )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    return PolicyConfig(model=str(folder), resolution=32, max_sequence_length=1, dtype=dtype)
