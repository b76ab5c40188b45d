"""Folders of models that bring code of their own, or damaged weights: none of it runs, each ends in one sentence."""

import io
import json
import pickle
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.slips import Result, call, complains, run
from safetensors.torch import load_file, save_file
from shared import CPU, HTTPRequest, python_path, serving

from firm.config import CriticConfig, PolicyConfig
from firm.critics.local import load_model, load_processor
from firm.policies.policy import Policy
from firm.records import UserError

TESTS = Path(__file__).parents[1]
WEIGHTS = TESTS.parent / "firm" / "shapes" / "weights"
Change = Callable[[Path, str], None]
"""Changes a model's folder, given a line of Python that leaves a mark."""


@pytest.fixture(autouse=True)
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that code of a model would write; whoever is asked on stdin says yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    path = tmp_path / "mark"
    yield path
    assert not path.exists(), "code of the model was run"


def load_critic(folder: Path) -> None:
    load_processor(str(folder))
    load_model(CriticConfig(model=str(folder), rubrics={}), str(folder))


def load_generator(folder: Path) -> None:
    Policy(PolicyConfig(model=str(folder), resolution=32, max_sequence_length=1), CPU)


def load_editor(folder: Path) -> None:
    Policy(PolicyConfig(family="qwen_image_edit", model=str(folder), resolution=32), CPU)


LOADERS = {"critic": load_critic, "base": load_generator, "editor": load_editor}


def made(tmp_path: Path, kind: str, change: Change) -> Path:
    folder = tmp_path / "evil"
    shutil.copytree(WEIGHTS / kind, folder)
    change(folder, f"open({str(tmp_path / 'mark')!r}, 'w')")
    return folder


def refused(folder: Path, load: Callable[[Path], None]) -> UserError:
    """The one sentence that loading the folder ends in."""
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(folder) in caught.value.where and caught.value.fix and caught.value.exit_code == 2
    assert "\n" not in caught.value.what and len(caught.value.what) < 400, caught.value.what
    return caught.value


# ---- code ------------------------------------------------------------------------------------------------------------


def edit(path: Path, **values: Any) -> None:
    """Set values of a JSON file, which may not be there yet; None removes one."""
    content = {**(json.loads(path.read_text()) if path.exists() else {}), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def names_code(file: str, **values: Any) -> Change:
    """The file names a class in ``evil.py`` beside it, and has other values, too."""
    classes = ("AutoConfig", "AutoModelForImageTextToText", "AutoModel", "AutoProcessor", "AutoImageProcessor",
               "AutoVideoProcessor", "AutoFeatureExtractor")  # fmt: skip

    def change(folder: Path, code: str) -> None:
        path = folder / file
        auto_map = {**dict.fromkeys(classes, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        edit(path, auto_map=auto_map, **values)
        (path.parent / "evil.py").write_text(f"{code}\nclass Evil:\n    pass\n")

    return change


def pipeline_of(component: str, module: str) -> Change:
    """The pipeline's own class, or a component of it, is in a module of the folder."""

    def change(folder: Path, code: str) -> None:
        edit(folder / "model_index.json", **{component: [module, "Evil"]})
        for path in (folder, folder / component):
            if path.is_dir():
                (path / f"{module}.py").write_text(f"{code}\nclass Evil:\n    pass\n")

    return change


def kernel(file: str, part: str = "", **values: Any) -> Change:
    """The file, or a part of it, asks for a kernel of a hub: transformers runs it where package `kernels` is there."""

    def change(folder: Path, _: str) -> None:
        path = folder / file
        edit(path, **({part: {**json.loads(path.read_text())[part], **values}} if part else values))

    return change


class Bomb:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def pickled(file: str, instead_of: str = "", write: Callable[[Any, Path], Any] = torch.save) -> Change:
    """Weights that are a pickle, in place of others."""

    def change(folder: Path, code: str) -> None:
        write(Bomb(code), folder / file)
        if instead_of:
            (folder / instead_of).unlink()

    return change


def raw(bomb: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(bomb))


def legacy(bomb: Any, path: Path) -> None:
    torch.save(bomb, path, _use_new_zipfile_serialization=False)


def indexed(folder: str, name: str) -> Change:
    """An index of safetensors files that names a pickle."""

    def change(model: Path, code: str) -> None:
        weights = model / folder / f"{name}.safetensors"
        keys = list(load_file(weights))
        torch.save(Bomb(code), weights.parent / "part.bin")
        edit(weights.parent / f"{name}.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(keys, "part.bin"))
        weights.unlink()

    return change


AUTO_MAP = ["code of its own", "auto_map"]
PICKLE = ["pickle", "safetensors"]
HUB = "evil/kernel"
KERNEL = ["code of a hub", HUB, "config.json"]
CODE: dict[str, tuple[str, Change, list[str]]] = {
    "model": ("critic", names_code("config.json"), [*AUTO_MAP, "config.json"]),
    "model of an unknown type": ("critic", names_code("config.json", model_type="evil"), AUTO_MAP),
    "model without a type": ("critic", names_code("config.json", model_type=None), AUTO_MAP),
    "processor": ("critic", names_code("processor_config.json"), [*AUTO_MAP, "processor_config.json"]),
    "unknown processor": ("critic", names_code("processor_config.json", processor_class="Evil"), AUTO_MAP),
    "image processor": ("critic", names_code("preprocessor_config.json", image_processor_type="Evil"), AUTO_MAP),
    "video processor": ("critic", names_code("video_preprocessor_config.json", video_processor_type="Evil"), AUTO_MAP),
    "tokenizer": ("critic", names_code("tokenizer_config.json"), [*AUTO_MAP, "tokenizer_config.json"]),
    "unknown tokenizer": ("critic", names_code("tokenizer_config.json", tokenizer_class="Evil"), AUTO_MAP),
    "generation": ("critic", names_code("generation_config.json"), AUTO_MAP),
    "adapter": ("critic", names_code("adapter_config.json", peft_type="LORA"), AUTO_MAP),
    "adapter of another model": (
        "critic",
        lambda folder, _: edit(folder / "adapter_config.json", base_model_name_or_path="evil/model", peft_type="LORA"),
        ["an adapter, not a model", "merge"],
    ),
    "text encoder": ("base", names_code("text_encoder/config.json", model_type="evil"), AUTO_MAP),
    "tokenizer of a pipeline": (
        "base",
        names_code("tokenizer/tokenizer_config.json", tokenizer_class="Evil"),
        AUTO_MAP,
    ),
    "transformer": ("base", names_code("transformer/config.json", _class_name="Evil"), AUTO_MAP),
    "scheduler": ("base", names_code("scheduler/scheduler_config.json", _class_name="Evil"), AUTO_MAP),
    "vae": ("editor", names_code("vae/config.json", _class_name="Evil"), AUTO_MAP),
    "processor of a pipeline": ("editor", names_code("processor/processor_config.json"), AUTO_MAP),
    "image processor of a pipeline": (
        "editor",
        names_code("processor/preprocessor_config.json", image_processor_type="Evil"),
        AUTO_MAP,
    ),
    "pipeline": ("base", pipeline_of("_class_name", "pipeline"), ["_class_name", "'pipeline'"]),
    "pipeline of an editor": ("editor", pipeline_of("_class_name", "my_pipeline"), ["_class_name", "'my_pipeline'"]),
    "component scheduler": ("base", pipeline_of("scheduler", "evil"), ["scheduler", "'evil'"]),
    "component transformer": ("base", pipeline_of("transformer", "evil"), ["transformer", "'evil'"]),
    "component of any module": ("editor", pipeline_of("vae", "subprocess"), ["vae", "'subprocess'"]),
    "kernel": ("critic", kernel("config.json", attn_implementation=HUB), KERNEL),
    "kernel under an older name": ("critic", kernel("config.json", _attn_implementation=f"{HUB}@main:run"), KERNEL),
    "kernel of a part": ("critic", kernel("config.json", "text_config", attn_implementation=HUB), KERNEL),
    "kernel for a part": ("critic", kernel("config.json", attn_implementation={"vision_config": f"x|{HUB}"}), KERNEL),
    "kernel for experts": ("critic", kernel("config.json", experts_implementation=HUB), KERNEL),
    "kernel of a text encoder": ("base", kernel("text_encoder/config.json", attn_implementation=HUB), KERNEL),
    "pickle": ("critic", pickled("pytorch_model.bin", "model.safetensors"), [*PICKLE, "pytorch_model.bin"]),
    "raw pickle": ("critic", pickled("pytorch_model.bin", "model.safetensors", raw), PICKLE),
    "legacy pickle": ("critic", pickled("pytorch_model.bin", "model.safetensors", legacy), PICKLE),
    "pickle of another name": ("critic", pickled("model.pt", "model.safetensors"), [*PICKLE, "model.pt"]),
    "checkpoint": ("critic", pickled("consolidated.00.pth", "model.safetensors"), PICKLE),
    "adapter that is a pickle": ("critic", pickled("adapter_model.bin", "model.safetensors"), PICKLE),
    "pickle of a transformer": (
        "base",
        pickled("transformer/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.safetensors"),
        [*PICKLE, "transformer/diffusion_pytorch_model.bin"],
    ),
    "pickle of a text encoder": (
        "base",
        pickled("text_encoder/pytorch_model.bin", "text_encoder/model.safetensors"),
        [*PICKLE, "text_encoder/pytorch_model.bin"],
    ),
    "pickle of a VAE": (
        "editor",
        pickled("vae/diffusion_pytorch_model.ckpt", "vae/diffusion_pytorch_model.safetensors"),
        PICKLE,
    ),
    "pickle of an index": ("critic", indexed("", "model"), [*PICKLE, "part.bin"]),
    "pickle of a transformer's index": (
        "base",
        indexed("transformer", "diffusion_pytorch_model"),
        [*PICKLE, "part.bin"],
    ),
    "pickle of a text encoder's index": ("editor", indexed("text_encoder", "model"), [*PICKLE, "part.bin"]),
}


@pytest.mark.parametrize("case", CODE)
def test_code_of_a_model_is_refused_and_never_run(tmp_path: Path, case: str) -> None:
    kind, change, words = CODE[case]
    error = refused(made(tmp_path, kind, change), LOADERS[kind])
    for word in words:
        assert word in str(error), str(error)


@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_never_read_does_no_harm(tmp_path: Path, kind: str) -> None:
    def change(folder: Path, code: str) -> None:
        for path in (folder, *(p for p in folder.iterdir() if p.is_dir())):
            (path / "evil.py").write_text(code)
        for weights in folder.rglob("*.safetensors"):
            torch.save(Bomb(code), weights.with_name("training_args.bin"))
            torch.save(Bomb(code), weights.with_name("pytorch_model.bin"))
        torch.save(Bomb(code), folder / "training_args.bin")

    LOADERS[kind](made(tmp_path, kind, change))


@pytest.mark.parametrize("case", ["unknown processor", "scheduler", "pickle"])
def test_the_command_refuses_it_before_anything_starts(tmp_path: Path, case: str) -> None:
    kind, change, words = CODE[case]
    made(tmp_path, kind, change)
    key = {"critic": "critic.model", "base": "policy.model"}[kind]
    words_of_it = run("gen-shapes", f"{key}=evil")  # a folder that could be a hub id
    result = call(tmp_path, "-m", "firm.cli", *words_of_it, input="y\n" * 9, timeout=300)
    complains(result, 2, *words, "evil/")
    assert not (tmp_path / "runs").exists()


# ---- a hub -----------------------------------------------------------------------------------------------------------

LOAD = """
import sys
from pathlib import Path
from integration.test_evil_models import LOADERS
from firm.records import UserError
try:
    LOADERS[sys.argv[1]](Path("org/evil"))
except UserError as error:
    print(error)
"""


def hub(folder: Path) -> Callable[[HTTPRequest], None]:
    """Answers as a hub does that has one model, org/evil."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    about = {"id": "org/evil", "sha": "0" * 40, "private": False, "tags": [], "downloads": 0, "likes": 0}
    about["siblings"] = [{"rfilename": name} for name in names]
    tree = [{"type": "file", "path": n, "oid": "0" * 40, "size": (folder / n).stat().st_size} for n in names]

    def answer(request: HTTPRequest) -> None:
        path = request.path.partition("?")[0]
        name = path.rpartition("/resolve/")[2].partition("/")[2]
        if path.startswith("/api/models/org/evil"):
            found = tree if path.endswith("/tree/" + "0" * 40) else [] if "/tree/" in path else about
            request.reply(200, json.dumps(found).encode(), Content_Type="application/json")
        elif name in names:
            content = (folder / name).read_bytes()
            request.reply(200, content, ETag=f'"{zlib.crc32(content)}"', X_Repo_Commit="0" * 40)
        else:
            request.reply(404, b"", X_Error_Code="EntryNotFound")

    return answer


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unknown processor", "image processor of a pipeline", "pickle of a transformer"])
def test_a_model_of_a_hub_runs_nothing_either(tmp_path: Path, case: str) -> None:
    kind, change, _ = CODE[case]
    result = from_hub(tmp_path, kind, change)
    assert result.returncode == 0 and "\n  -> " in result.stdout, result.stdout + result.stderr
    assert "evil" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["critic", "editor"])
def test_a_plain_model_of_a_hub_is_loaded(tmp_path: Path, kind: str) -> None:
    result = from_hub(tmp_path, kind, lambda *_: None)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def from_hub(tmp_path: Path, kind: str, change: Change) -> Result:
    with serving(hub(made(tmp_path, kind, change))) as url:
        env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        env["PYTHONPATH"] = python_path(TESTS, TESTS.parent)
        return call(tmp_path, "-c", LOAD, kind, env=env, input="y\n" * 9, timeout=300)


# ---- damage ----------------------------------------------------------------------------------------------------------


def header(length: int, text: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(length.to_bytes(8, "little") + text)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], object]:
    return lambda path: save_file(change(load_file(path)), path, {"format": "pt"})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
    "a pickle of that name": lambda path: path.write_bytes(pickle.dumps(Bomb("1 / 0"))),
    "a header of 2**63 bytes": header(2**63, b"{}"),
    "a header of 2**40 bytes": header(2**40, b"{}"),
    "a header that is no JSON": header(5, b"[[[[["),
    "a deep header": header(100_000, b"[" * 100_000),
    "tensors beyond the end": header(60, b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,99999999]}}'[:60]),
    "other shapes": tensors(lambda all: {k: t.repeat(*(2 for _ in t.shape)) for k, t in all.items()}),
    "one tensor missing": tensors(lambda all: dict(list(all.items())[1:])),
    "no tensors": tensors(lambda all: {}),
    "other names": tensors(lambda all: {f"x.{k}": t for k, t in all.items()}),
}
WHERE = {"critic": "model.safetensors", "base": "transformer/diffusion_pytorch_model.safetensors",
         "editor": "text_encoder/model.safetensors"}  # fmt: skip


MISSING = ("one tensor missing", "no tensors", "other names")  # transformers draws those of a text encoder, and warns


@pytest.mark.parametrize(
    ("kind", "damage"), [(kind, d) for kind in WHERE for d in DAMAGE if (kind, d in MISSING) != ("editor", True)]
)
def test_damaged_weights_end_in_one_sentence(tmp_path: Path, kind: str, damage: str) -> None:
    refused(made(tmp_path, kind, lambda folder, _: DAMAGE[damage](folder / WHERE[kind])), LOADERS[kind])


CONFIGS = {"critic": "config.json", "base": "transformer/config.json", "editor": "processor/processor_config.json"}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "1" * 5000, '{"a": ' * 3000, "null", "[1]", "\0", '{"hidden_size": -1}']
)
def test_a_damaged_configuration_ends_in_one_sentence(tmp_path: Path, kind: str, text: str) -> None:
    def change(folder: Path, _: str) -> None:
        (folder / CONFIGS[kind]).write_text(text)

    refused(made(tmp_path, kind, change), LOADERS[kind])
