"""A folder of edits with their images, as a user has it."""

import json
from pathlib import Path

from PIL import Image

from firm.images import encode_image

ROWS = 6
COMMIT = "1" * 40


def write_edits(folder: Path) -> None:
    """Write edits.jsonl and its images into a new folder; sources differ in red, edits in green."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(ROWS):
        for kind, shade in (("source", 0), ("edit", 9)):
            image = Image.new("RGB", (8, 8), (20 * i, shade, 0))
            (folder / "images" / f"{kind}-{i}.png").write_bytes(encode_image(image))
        row = {"prompt": f"make it red, {i}", "source_image": f"images/source-{i}.png"}
        rows.append({**row, "image": f"./images/edit-{i}.png", "scores": {"quality": 3}})
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
