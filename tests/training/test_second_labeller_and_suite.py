"""A second labeller and a second suite are modules of their user's and one line in a table each."""

import json
from pathlib import Path

import pytest
from shared import CPU, rendered

from firm import preflight
from firm.config.loading import load_config
from firm.critics.labeller import LABELLERS
from firm.curation.run import run as curate
from firm.evaluate.run import run as evaluate
from firm.evaluate.suite import SUITES
from firm.policies.policy import Policy, save_policy
from firm.records import Example, JudgedCandidate, Sample, UserError
from firm.storage.artifacts import Output
from firm.storage.shards import iter_shards

MODULES = {
    "second_labeller": '''
from firm.records import JudgedCandidate, Judgement, Provenance


class Brightness:
    """Tells its material, and judges by it."""

    def __init__(self, config, open_chat):
        self.dimensions = list(config.dimensions)
        self.asked = open_chat("helper", config.evaluator).name

    def label(self, candidates):
        return [self._one(candidate) for candidate in candidates]

    def _one(self, candidate):
        score = len(candidate.images[0]) % 5 + 1
        return JudgedCandidate(
            **dict(candidate),
            material={"size": [f"{len(candidate.images[0])} bytes"]},
            assessment={d: Judgement(score=score, rationale="by size") for d in self.dimensions},
            provenance=Provenance(teacher=self.asked, rubrics={}, answers=dict.fromkeys(self.dimensions, "")),
        )

    @staticmethod
    def difficulty(judged, config):
        return judged.material["size"][0]
''',
    "second_suite": '''
from firm.records import Prompt, Summary


class Sizes:
    """Counts the bytes of images: scores of its own, from 0 on."""

    def __init__(self, config, critic, device, open_chat):
        self.number = config.evaluate.num_images

    def prompts(self):
        return [Prompt(text=f"a {('red', 'blue')[i % 2]} circle") for i in range(self.number)]

    def score(self, prompts, images):
        return [{"bytes": len(png), "asked": prompt.text} for prompt, png in zip(prompts, images, strict=True)]

    def summary(self, samples):
        return Summary(stage="evaluate", metrics={"bytes": float(sum(s.scores["bytes"] for s in samples))})
''',
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(LABELLERS, "brightness", "second_labeller:Brightness")
    monkeypatch.setitem(SUITES, "sizes", "second_suite:Sizes")
    return tmp_path


def test_another_labeller_curates(folder: Path) -> None:
    sources = f"curation.sources={json.dumps([rendered(40)])}"
    config = load_config("gen-shapes", ["curation.labeller=brightness", sources])
    preflight.check(config)
    out = Output.open(str(folder / "curated"))
    summary = curate(config, {}, out)
    judged = list(iter_shards(out.folder / "judged", JudgedCandidate))
    assert len(judged) == 40 and judged[0].material == {"size": [f"{len(judged[0].images[0])} bytes"]}
    [example, *_] = iter_shards(out.folder / "train", Example)
    assert example.difficulty.endswith(" bytes") and "by size" in example.messages[1].content
    assert summary.metrics["invalid_judgements"] == 0


def test_another_suite_evaluates(folder: Path) -> None:
    config = load_config(
        "gen-shapes", ["evaluate={suite: sizes, num_images: 6, num_inference_steps: 2, batch_size: 3}"]
    )
    preflight.check(config)
    policy = Policy(config.policy, CPU)
    policy.train(None, (), seed=0)
    save_policy(folder / "rl" / "policy", policy)
    out = Output.open(str(folder / "evaluated"))
    summary = evaluate(config, {"critic": folder, "policy": folder / "rl"}, out)
    samples = list(iter_shards(out.folder / "samples", Sample))
    assert [s.policy for s in samples] == ["base"] * 6 + ["final"] * 6
    assert samples[1].scores == {"bytes": len(samples[1].images[0]), "asked": "a blue circle"}
    assert summary.metrics["bytes"] == sum(len(s.images[0]) for s in samples)
    json.dumps([s.scores for s in samples])


@pytest.mark.parametrize("key", ["curation.labeller", "evaluate.suite"])
def test_a_name_that_is_in_no_table_is_refused(key: str) -> None:
    with pytest.raises(UserError, match="there is no 'absent'") as caught:
        preflight.check(load_config("gen-shapes", [f"{key}=absent"]))
    assert caught.value.where == key and caught.value.exit_code == 2
