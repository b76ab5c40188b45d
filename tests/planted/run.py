"""Planted critics against the gate and the auditor of the preset gen-shapes: `make planted`.

Every critic goes, on every seed, through bench and gate as a trained one would, and through RL where the gate lets it
pass. A row is written as soon as it is finished, finished rows are not run again, and RL resumes from its checkpoints.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from planted.critics import BAD, GOOD, Planted
from planted.table import ROWS, Row, read_rows, write

from firm.bench import run as bench
from firm.config import RunConfig
from firm.config.loading import load_config
from firm.config.reward import REWARD
from firm.critics.load import open_judge
from firm.gate import run as gate
from firm.metrics import read_metrics
from firm.records import UserError, Verdict
from firm.rl import train as rl
from firm.rl.audit import Audit
from firm.rl.run import summary
from firm.stage import execute
from firm.storage.artifacts import Output
from firm.storage.inputs import open_input, read_ref

SEEDS = (0, 1, 2)
EPOCHS = 40  # beyond 50, RL loses what it gained even with the teacher as its critic, as both judges see
TEST_IMAGES = 150  # of each source of curation


def planted_config(
    seed: int, store: Path, overrides: Sequence[str] = (), test_images: int = TEST_IMAGES, preset: str = "gen-shapes"
) -> RunConfig:
    """A preset, with as many images to curate as the bench needs: no critic is trained, and the auditor is right."""
    fewer = ["bench.num_bootstrap=200", "bench.auditor_images=1", f"rl.max_epochs={EPOCHS}"]
    config = load_config(preset, [f"seed={seed}", f"store={store}", "name=planted", *fewer, *overrides])
    sources = [source.model_copy(update={"num_images": 2 * test_images}) for source in config.curation.sources]
    curation = config.curation.model_copy(update={"sources": sources, "test_share": 0.5})
    return config.model_copy(update={"curation": curation})


def curated(config: RunConfig) -> Path:
    """Folder of the curated examples, made or found."""
    pointer = Path(config.store) / f"data-{config.seed}.json"
    pointer.parent.mkdir(parents=True, exist_ok=True)
    execute("curation", config.model_dump(mode="json"), {}, str(pointer))
    return open_input(read_ref(pointer))


@contextmanager
def steered_by(critic: Planted) -> Iterator[None]:
    """Bench and RL get this critic in place of a trained one."""
    with patch.object(bench, "load_critic", lambda *_: critic), patch.object(rl, "load_critic", lambda *_: critic):
        yield


def make(critic: type[Planted], config: RunConfig) -> Planted:
    """A planted critic that starts from the auditor's scores, which in the embedded world are the teacher's."""
    return critic(open_judge(config.auditor.judge, config.auditor.rubrics), config.seed)


def gated(critic: Planted, config: RunConfig, data: Path) -> list[str]:
    """The gate's sentences on a critic; empty if it lets it pass."""
    folder = Path(config.store) / f"bench-{type(critic).__name__}-{config.seed}"
    judged = Path(config.store) / f"judged-{config.seed}"  # by the teacher: the same for every critic
    if judged.exists():
        shutil.copytree(judged, folder / bench.JUDGED, dirs_exist_ok=True)
    with steered_by(critic):
        bench.run(config, {"data": data, "critic": folder}, Output.open(str(folder)))
    shutil.copytree(folder / bench.JUDGED, judged, dirs_exist_ok=True)
    try:
        gate.run(config, {"bench": folder}, Output.open(str(folder / "gate")))
    except UserError:
        return Verdict.model_validate_json((folder / bench.VERDICT).read_text()).failures
    return []


def audited(critic: Planted, config: RunConfig) -> Row:
    """RL with a critic that has passed the gate."""
    out = Output.open(f"{config.store}/rl-{type(critic).__name__}-{config.seed}")
    with steered_by(critic):
        rl.train({"config": config.model_dump(mode="json")}, {"critic": out.folder}, out)
    audits = [Audit.model_validate(line) for line in read_metrics(out.folder / rl.AUDITS)]
    found = summary(config, audits, read_metrics(out.folder / rl.METRICS)).metrics
    return Row(
        critic=type(critic).__name__,
        seed=config.seed,
        failures=[],
        epochs=int(found["epochs"]),
        rewards=tuple(round(a.mean("auditor", REWARD), 4) for a in audits if a.sample == "check"),
        kept_epoch=int(found["kept_epoch"]),
        kept=round(found["auditor_reward_kept"], 4),
        stopped=bool(found["stopped_by_auditor"]),
    )


def main() -> None:
    """Run what has no row yet, the gate for all critics before the first RL, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="folder for the runs")
    parser.add_argument("--only", nargs="*", default=[], help="names of critics, instead of all")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    arguments = parser.parse_args()
    done = {(row.critic, row.seed) for row in read_rows()}
    chosen = [critic for critic in (*BAD, *GOOD) if not arguments.only or critic.__name__ in arguments.only]
    passed = list[tuple[Planted, RunConfig]]()
    for seed in arguments.seeds:
        config = planted_config(seed, arguments.store)
        for critic in (make(c, config) for c in chosen if (c.__name__, seed) not in done):
            failures = gated(critic, config, curated(config))
            if failures:
                add(Row(critic=type(critic).__name__, seed=seed, failures=failures))
            else:
                passed.append((critic, config))
    for critic, config in passed:
        add(audited(critic, config))
    write()


def add(row: Row) -> None:
    """Append a finished row."""
    with ROWS.open("a") as file:
        file.write(row.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
