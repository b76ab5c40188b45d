"""Data that users give on the hub: streamed from its commit, and what goes wrong on the way."""

from collections.abc import Callable
from pathlib import Path

import pytest
from integration.own import COMMIT, ROWS, write_edits
from integration.slips import Result, call
from shared import HTTPRequest, python_path, serving

READ = """
import sys
from firm.prompts import load_prompts
from firm.config import PromptsConfig
from firm.records import UserError
from firm.storage.given import given
from firm.storage.pictures import image_size, open_image
try:
    prompts = load_prompts(PromptsConfig(path=sys.argv[1], test_share=0), "train")
    for prompt in prompts:
        print(prompt.text, image_size(prompt.image, ""), open_image(prompt.image, "").getpixel((0, 0)))
    assert given(sys.argv[1]).content_hash(("source_image",)) == sys.argv[1]
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_edits(tmp_path / "data")
    return tmp_path / "data"


def hub(folder: Path, in_ranges: bool = True) -> Callable[[HTTPRequest], None]:
    """Answers as a hub does that has one dataset, org/data, at one commit; not every mirror knows ranges."""

    def answer(request: HTTPRequest) -> None:
        path = request.path.partition("?")[0]
        file = folder / path.removeprefix(f"/datasets/org/data/resolve/{COMMIT}/")
        if not path.startswith(f"/datasets/org/data/resolve/{COMMIT}/") or not file.is_file():
            request.reply(404, b"", X_Error_Code="EntryNotFound")
            return
        content = file.read_bytes()
        about = {"ETag": f'"{len(content)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if in_ranges and (part := request.headers.get("Range")):
            first, last = map(int, part.removeprefix("bytes=").split("-"))
            about["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            request.reply(206, content[first : last + 1], **about)
        else:
            request.reply(200, content, **about)

    return answer


def reads(tmp_path: Path, url: str, name: str = "edits.jsonl") -> Result:
    """A process that reads a file of the hub's dataset and its images."""
    env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env["PYTHONPATH"] = python_path(Path(__file__).parents[2])
    return call(tmp_path, "-c", READ, f"hf://datasets/org/data@{COMMIT}/{name}", env=env, timeout=300)


def test_a_dataset_of_the_hub_is_read_at_its_commit(folder: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    answer = hub(folder)
    with serving(lambda request: (asked.append(f"{request.command} {request.path}"), answer(request))[1]) as url:
        result = reads(tmp_path, url)
        assert result.returncode == 0, result.stderr
        sizes = [line for line in asked if line.startswith("HEAD ") and line.endswith(".png")]
        assert len(sizes) == len(set(sizes)) == ROWS, "each is asked for once"
        lines = [f"make it red, {i} (8, 8) ({20 * i}, 0, 0)" for i in range(ROWS)]
        assert result.stdout.splitlines() == lines
        assert not list((tmp_path / "cache").rglob("*.png"))
        (folder / "images" / "source-1.png").unlink()
        for name, absent in (("edits.jsonl", "source-1"), ("absent.jsonl", "absent")):
            result = reads(tmp_path, url, name)
            assert result.returncode == 1 and "cannot read from the hub" in result.stderr and absent in result.stderr


def test_a_mirror_that_knows_no_ranges_is_said(folder: Path, tmp_path: Path) -> None:
    with (folder / "images" / "source-0.png").open("ab") as file:
        file.write(bytes(2**17))  # more than is fetched at once
    with serving(hub(folder, in_ranges=False)) as url:
        result = reads(tmp_path, url)
    assert result.returncode == 1 and "bytes were asked for and" in result.stderr
