"""Encoders that wait on the host are on the device while they encode, and it makes no difference to anything."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from shared import EDITING, GENERATION, POLICIES

from firm.config import PolicyConfig
from firm.images import encode_image
from firm.policies.encoders import tensors_of
from firm.policies.generate import draw, encode
from firm.policies.policy import Policy
from firm.records import Prompt

DEVICE = torch.device("cpu", 0)  # to torch another place than "cpu": what is moved there is copied


def values_of(policy: Policy) -> list[int]:
    """Where in memory the encoders' values are."""
    return [t.data_ptr() for t in tensors_of(policy.family.encoders) if t.numel()]


@pytest.mark.parametrize("task", [GENERATION, EDITING])
def test_encoders_wait_on_the_host_and_images_are_the_same(task: str, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    source.write_bytes(encode_image(Image.new("RGB", (32, 32), "red")))
    image = str(source) if task == EDITING else None
    prompts = [Prompt(text=text, image=image) for text in ("make it blue", "make it green", "make it blue")]
    images, calls = {}, {}
    for wait in (False, True):
        policy = Policy(PolicyConfig(**POLICIES[task], offload_encoders=wait), DEVICE)
        home = values_of(policy)
        passes: list[tuple[str, bool]] = []
        for name, module in (("encoder", policy.family.encoders[0]), ("denoiser", policy.family.denoiser)):
            module.register_forward_pre_hook(
                lambda *_, name=name, policy=policy, home=home, seen=passes: seen.append(
                    (name, values_of(policy) == home)
                )
            )
        encoded = encode(policy, prompts, guided=True)
        assert values_of(policy) == home
        options = {"num_inference_steps": 2, "guidance_scale": 3.0}
        images[wait] = draw(policy, encoded, range(3), 0, "test", **options)  # type: ignore[arg-type]
        calls[wait] = passes
    assert images[True] == images[False]
    assert calls[False] == [("encoder", True)] * 2 + [("denoiser", True)] * 4
    assert calls[True] == [("encoder", False)] * 2 + [("denoiser", True)] * 4


def test_nested_use_moves_them_once_and_a_failure_brings_them_home() -> None:
    policy = Policy(PolicyConfig(**POLICIES[GENERATION], offload_encoders=True), DEVICE)
    home = values_of(policy)
    with pytest.raises(KeyError), policy.encoders.here():
        there = values_of(policy)
        assert not set(there) & set(home)
        used: list[list[int]] = []
        policy.family.encoders[0].register_forward_pre_hook(lambda *_: used.append(values_of(policy)))
        policy.encode([Prompt(text="a red circle")])
        assert used == [there] and values_of(policy) == there
        raise KeyError
    assert values_of(policy) == home
