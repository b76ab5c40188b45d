"""A second family is a module of its user's and one line in FAMILIES: it is checked, trained, saved and evaluated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shared import CPU, Redness

from firm import preflight
from firm.config import RewardConfig, RLConfig, RunConfig
from firm.config.loading import load_config
from firm.evaluate import held_out
from firm.evaluate import run as evaluate
from firm.images import decode_image
from firm.metrics import read_metrics
from firm.policies.policy import FAMILIES, load_policy
from firm.records import Sample, UserError
from firm.rl import train as rl
from firm.storage.artifacts import Output
from firm.storage.shards import iter_shards

MODULE = '''
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from firm.policies.policy import Conditions
from firm.records import UserError


class Denoiser(nn.Module):
    """Each token [48] by itself, knowing prompt [8] and noise level."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48 + 8 + 1, 48)

    def forward(self, x, sigma, text):
        known = torch.cat([text, sigma[:, None]], 1)[:, None].expand(-1, x.shape[1], -1)
        return self.linear(torch.cat([x, known], 2))


class Tiny:
    """Latents [64, 48]: the tokens of an image of 8 x 8 patches, each of 4 x 4 pixels of 3 colours."""

    edits = False
    encoders = ()
    lora_targets = ("linear",)
    latent_shape = (64, 48)

    def __init__(self, config, device):
        self.denoiser = Denoiser().to(device)
        self.denoiser.load_state_dict(load_file(Path(config.model) / "tiny.safetensors"))

    @classmethod
    def check(cls, model, key):
        if not (Path(model) / "tiny.safetensors").is_file():
            raise UserError("not a tiny model", key, "make one", usage=True)

    def encode(self, prompts):
        texts = [[sum(prompt.text.encode()[i::8]) / 1000 for i in range(8)] for prompt in prompts]
        return Conditions({"text": torch.tensor(texts)})

    def blank(self, number, tokens):
        return Conditions({"text": torch.empty(number, 8)})

    def velocity(self, latents, sigma, conditions):
        return self.denoiser(latents, sigma, conditions.tensors["text"])

    def guided(self, velocity, negative, scale):
        return negative + scale * (velocity - negative)

    def decode(self, latents):
        grid = latents.view(-1, 8, 8, 4, 4, 3).transpose(2, 3).reshape(-1, 32, 32, 3)
        return ((grid / 4 + 0.5).clamp(0, 1) * 255).to(torch.uint8)

    def sigmas(self, num_inference_steps):
        return torch.linspace(1, 0, num_inference_steps + 1)

    def save(self, folder):
        save_file(self.denoiser.state_dict(), folder / "trained.safetensors")

    def load(self, folder):
        self.denoiser.load_state_dict(load_file(folder / "trained.safetensors"))
'''


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run with a model of the second family, whose critic is Redness."""
    (tmp_path / "tiny_family.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FAMILIES, "tiny", "tiny_family:Tiny")
    for module in (rl, held_out):
        monkeypatch.setattr(module, "load_critic", lambda *_: Redness(dimensions=("instruction_following", "quality")))
    import tiny_family  # type: ignore[import-not-found]
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(tiny_family.Denoiser().state_dict(), tmp_path / "tiny.safetensors")
    run = load_config("gen-shapes")
    few: dict[str, Any] = {"prompts_per_epoch": 2, "group_size": 4, "max_epochs": 1, "num_inference_steps": 3}
    policy = {"family": "tiny", "model": str(tmp_path), "resolution": 32, "max_sequence_length": 256}
    return run.model_copy(
        update={
            "policy": run.policy.model_copy(update=policy),
            "rl": RLConfig(**few, kl_weight=0.01),
            "reward": RewardConfig(formula="base_only", base="instruction_following"),
            "auditor": run.auditor.model_copy(update={"num_images": 4}),
            "evaluate": run.evaluate.model_copy(update={"num_images": 6, "batch_size": 4, "guidance_scale": 2.0}),
        }
    )


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["full", "lora"])
def test_a_second_family_trains_and_evaluates(config: RunConfig, tmp_path: Path, lora: dict[str, int] | None) -> None:
    config = config.model_copy(update={"rl": RLConfig(**{**config.rl.model_dump(), "lora": lora})})
    preflight.check(config)
    out = Output.open(str(tmp_path / "rl"))
    rl.train({"config": config.model_dump(mode="json")}, {"critic": tmp_path}, out)
    [line] = read_metrics(out.folder / "metrics.jsonl")
    assert line["loss"] > 0 and line["grad_norm"] > 0
    assert load_policy(out.folder / "policy", CPU).latent_shape == (64, 48)
    scores = Output.open(str(tmp_path / "evaluate"))
    summary = evaluate.run(config, {"critic": tmp_path, "policy": out.folder}, scores)
    assert "auditor_instruction_following_gain" in summary.metrics
    samples = list(iter_shards(scores.folder / "samples", Sample))
    assert len(samples) == 12 and {decode_image(s.images[0], "").size for s in samples} == {(32, 32)}


def test_preflight_asks_the_family(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny.safetensors").unlink()
    with pytest.raises(UserError, match="not a tiny model") as caught:
        preflight.check(config)
    assert caught.value.where == "policy.model"
