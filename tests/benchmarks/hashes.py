"""Hashes of what a run has made: of each curated shard, and of each tensor of critic and policy.

    firm run small.yaml --set store=before    # with the old code, then with the new code and store=after
    python tests/benchmarks/hashes.py before/small >before.txt

A change that is meant to change no result leaves every line as it was.
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open


def shards(run: Path) -> Iterator[str]:
    """One line per shard of the curated data."""
    for path in run.glob("curation-*/*/*.parquet"):
        yield f"{path.relative_to(path.parents[1])} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def tensors(run: Path) -> Iterator[str]:
    """One line per tensor, under the name that it has in the model, whatever file it is in."""
    for stage, folder in (("sft", "critic"), ("rl", "policy")):
        for path in run.glob(f"{stage}-*/{folder}/**/*.safetensors"):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (no dict)
                    tensor = file.get_tensor(key).contiguous()
                    name = key.replace(".default.", ".").removeprefix("transformer.")
                    digest = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
                    yield f"{folder} {name} {tuple(tensor.shape)} {tensor.dtype} {digest}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, which holds its artifacts")
    folder = parser.parse_args().run
    print("\n".join(sorted([*shards(folder), *tensors(folder)])))
