"""Writes the lists of packages that the images install: ``lists.py PYPROJECT FOLDER NAME...``.

``all.txt`` has the package's dependencies, ``torch.txt`` PyTorch's own, ``slim.txt`` all but the named ones.
"""

import re
import sys
import tomllib
from pathlib import Path

_, pyproject, folder, *left_out = sys.argv
dependencies = tomllib.loads(Path(pyproject).read_text())["project"]["dependencies"]
names = {line: re.split(r"[^\w.-]", line)[0] for line in dependencies}
if unknown := set(left_out) - set(names.values()):
    sys.exit(f"slim is to go without what FIRM does not need: {', '.join(sorted(unknown))}")
lists = {
    "all": dependencies,
    "torch": [line for line in dependencies if names[line].startswith("torch")],
    "slim": [line for line in dependencies if names[line] not in left_out],
}
for name, lines in lists.items():
    (Path(folder) / f"{name}.txt").write_text("\n".join(lines) + "\n")
