"""Where the configuration of a model comes from, and that the shipped ones are those of the releases."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from shared import BASE, CPU
from torch import nn

from firm.config import CriticConfig, PolicyConfig
from firm.config.loading import load_config
from firm.critics.local import load_model
from firm.plan.meter import Meter
from firm.plan.origins import RELEASED, configured
from firm.policies.policy import Policy
from firm.records import UserError


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert configured(str(tmp_path), "critic.model") == tmp_path
    assert (configured(BASE, "policy.model") / "model_index.json").is_file()


def test_what_the_hub_has_put_on_this_machine_comes_before_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = "Qwen/Qwen3-VL-8B-Instruct"
    assert configured(name, "critic.model") == RELEASED / name
    repository = tmp_path / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert configured(name, "critic.model") == snapshot


@pytest.mark.parametrize("model", ["org/nobody-knows-it", "not a hub id"])
def test_a_model_that_is_nowhere_is_named(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"not on this machine \(critic\.model\)\n.*give a folder.*Qwen3-VL-8B"
    ) as caught:
        configured(model, "critic.model")
    assert caught.value.exit_code == 2


def test_every_model_that_a_preset_names_by_its_hub_id_is_known() -> None:
    for preset in ("gen-sd35", "edit-qwen-image-edit-2509"):
        config = load_config(preset, [])
        assert (RELEASED / config.policy.model / "model_index.json").is_file()
        assert (RELEASED / config.critic.model / "config.json").is_file()
    for path in RELEASED.rglob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict)


# Of the classes built; the releases are said to have 8.77e9, 2.2e9 (T5 4.76e9) and 20.4e9 (text encoder 8.29e9).
PARAMETERS = {
    "Qwen/Qwen3-VL-8B-Instruct": {"": 8_767_123_696},
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer": 2_243_171_520, "text_encoder_3": 4_762_310_656, "text_encoder_2": 694_659_840,
        "text_encoder": 123_650_304, "vae": 83_819_683,
    },
    "Qwen/Qwen-Image-Edit-2509": {
        "transformer": 20_430_401_088, "text_encoder": 8_292_166_656, "vae": 126_892_531,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", PARAMETERS)
def test_released_models_have_as_many_parameters_as_they_should(model: str) -> None:
    folder = str(configured(model, ""))
    with Meter():
        parts: dict[str, nn.Module] = {}
        if (Path(folder) / "config.json").is_file():
            parts[""] = load_model(CriticConfig(model=folder, rubrics={}), folder)
        else:
            family = "sd3" if "diffusion" in model else "qwen_image_edit"
            policy = Policy(PolicyConfig(family=family, model=folder, resolution=512, dtype="bfloat16"), CPU)
            components = vars(policy.family)["_pipe"].components
            parts = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert counts == PARAMETERS[model]
