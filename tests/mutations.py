"""Plants faults in a copy of the code, one at a time, and reports those that no test notices: `make mutations`.

Each row of the table is a fault that would ruin a run without an error: the file, what stands there, what is planted,
and the tests that should fail. A fault that survives asks for a test, not for another row.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
AUDITED = "tests/training/test_rl_learns.py::test_the_average_is_audited_and_kept"
FRESH = "tests/training/test_rl_learns.py::test_candidates_are_audited_on_fresh_prompts_and_noise"
RL = ("tests/unit/rl", "tests/property/test_nft.py")
TRAINER = (*RL, "tests/training/test_rl_learns.py::test_the_old_policy_follows_after_the_epoch", AUDITED, FRESH)
PROCESSES = ("tests/training/test_rl_learns.py::test_two_processes_train_as_one",)
POLICIES = ("tests/unit/policies",)
CRITICS = ("tests/unit/critics", "tests/property/test_answers_property.py", "tests/property/test_soft_property.py")
SHARED = ("tests/unit/critics/test_prefix.py",)
SERVED = ("tests/integration/test_critic_server.py",)
CHAT = ("tests/unit/chat",)
CURATION = ("tests/unit/curation", "tests/property/test_balance.py")
BENCH = ("tests/unit/bench", "tests/unit/test_stats.py")
CONFIG = ("tests/unit/config",)
EDITS = ("tests/unit/shapes/test_edit_teacher.py", "tests/unit/shapes/test_editing.py")
ABLATION = ("tests/unit/ablation",)
PLANTED = ("tests/planted",)


class Fault(NamedTuple):
    """What is planted where, and who should notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = [
    # DiffusionNFT
    Fault("firm/rl/update.py", "sigmas[:, j], noise[:, j]", "sigmas[:, 0], noise[:, 0]", RL),
    Fault("firm/rl/update.py", 'policy.using("reference")', 'policy.using("old")', RL),
    Fault("firm/rl/update.py", 'with policy.using("old")', 'with policy.using("policy")', RL),
    Fault("firm/rl/update.py", '"update", epoch, inner, index', '"update", epoch, index', RL),
    Fault("firm/rl/update.py", '"update", epoch, inner, index', '"update", inner, index', RL),
    Fault("firm/rl/update.py", 'update_average("ema", ema_decay', 'update_average("old", ema_decay', RL),
    Fault("firm/rl/update.py", "count * sigmas.shape[1]", "count", RL),
    Fault("firm/rl/update.py", "sum_gradients(self.sets.trainable, self.ranks)", "pass", PROCESSES),
    Fault("firm/rl/rollout.py", 'f"rollout/{epoch}"', '"rollout"', RL),
    Fault("firm/rl/rollout.py", 'policy.using("old")', 'policy.using("policy")', RL),
    Fault("firm/rl/rollout.py", "JudgeInput(prompt, with_source(prompt, png))", "JudgeInput(prompt, [png])", RL),
    Fault("firm/rl/monitors.py", "-by > config.fall + CHANCE * error", "-by > config.fall", RL),
    Fault("firm/rl/monitors.py", "lines[-config.window :]", "lines[: config.window]", RL),
    Fault("firm/rl/train.py", 'self.sets.copy("ema", "best")', 'self.sets.copy("old", "best")', TRAINER),
    Fault(
        "firm/rl/train.py",
        'self.sets.update_average("old", old_decay',
        'self.sets.update_average("ema", old_decay',
        TRAINER,
    ),
    # the auditor's statistics
    Fault("firm/rl/auditor.py", "using(parameters)", 'using("policy")', TRAINER),
    Fault("firm/rl/auditor.py", 'f"audit/{sample}"', '"audit"', TRAINER),
    Fault("firm/rl/auditor.py", "-1 - get_args(SampleName).index(sample)", "-1", TRAINER),
    Fault("firm/rl/auditor.py", 'candidates[epoch], "report"', 'candidates[epoch], "choice"', RL),
    Fault(
        "firm/rl/auditor.py", "for judge in (self.critic, self.judge)", "for judge in (self.critic, self.critic)", RL
    ),
    Fault("firm/rl/auditor.py", "d, formula.soft)", "d, True)", RL),
    Fault("firm/rl/auditor.py", "kept = best(choice).epoch", "kept = max(candidates)", RL),
    Fault("firm/rl/train.py", "candidates[audits[-1].epoch]", "candidates[audits[0].epoch]", RL),
    Fault("firm/rl/auditor.py", "look(item.images)", "look(item.images[-1:])", RL),
    Fault("firm/rl/auditor.py", "for d in assessments[0]}", "for d in formula.dimensions}", RL),
    Fault("firm/rl/train.py", "and self.config.auditor.stops", "", RL),
    Fault("firm/ablation/rewards.py", 'plain["auditor"]["stops"] = False', "pass", ABLATION),
    Fault("firm/ablation/result.py", "self.checks[0 if when == BEFORE else -1]", "self.checks[-1]", ABLATION),
    Fault("firm/rl/audit.py", "recent = audits[-window:]", "recent = audits[-1:]", RL),
    Fault("firm/rl/train.py", '0: "reference"}', '0: "ema"}', TRAINER),
    Fault("firm/rl/audit.py", "interval[1] >= 0", "interval[0] >= 0", RL),
    Fault("firm/rl/audit.py", "(whole * looks * len(earlier) * len(measures))", "1", RL),
    Fault("firm/rl/audit.py", '"critic", measure)) <= ', '"critic", measure)) >= ', RL),
    Fault("firm/rl/audit.py", '"auditor", REWARD)) <= 0:', '"auditor", REWARD)) <= 9:', RL),
    Fault("firm/rl/audit.py", "(REWARD, *config.reward.dimensions)", "(REWARD,)", RL),
    Fault("firm/rl/audit.py", '[audit], "auditor", REWARD)) > 0', '[audit], "critic", REWARD)) > 0', RL),
    Fault("firm/rl/run.py", 'a.sample == "report"', 'a.sample == "choice"', RL),
    Fault("firm/intervals.py", "labels_of(clusters, values.size)", "labels_of(None, values.size)", BENCH),
    Fault(
        "firm/intervals.py",
        "valid = np.isfinite(values)",
        "valid = np.isfinite(values := np.nan_to_num(values))",
        BENCH,
    ),
    Fault("firm/intervals.py", " or 0.5**means.size > error", "", BENCH),
    Fault(
        "firm/rl/nft.py",
        "old_error - move), _self_normalised(old_error + move)",
        "old_error + move), _self_normalised(old_error - move)",
        RL,
    ),
    Fault(
        "firm/rl/nft.py",
        "r * errors.positive + (1 - r) * errors.negative",
        "(1 - r) * errors.positive + r * errors.negative",
        RL,
    ),
    Fault("firm/rl/nft.py", "flat.detach().abs()", "flat.abs()", RL),
    Fault("firm/rl/nft.py", "x_t - s * v_old.detach() - x0", "x_t - v_old.detach() - x0", RL),
    Fault("firm/rl/nft.py", "mask.sum(1, keepdim=True) >= 2", "mask.sum(1, keepdim=True) >= 1", RL),
    Fault("firm/rl/nft.py", "min(0.001 * step, 0.5)", "min(0.01 * step, 0.5)", RL),
    Fault("firm/rl/nft.py", "(1 + step) / (10 + step)", "(10 + step) / (11 + step)", RL),
    # policies
    Fault("firm/policies/parameters.py", "current, 1 - decay)", "current, decay)", (*POLICIES, *RL)),
    Fault("firm/policies/sd3.py", "sigma * 1000", "sigma * 999", POLICIES),
    Fault("firm/policies/sd3.py", " + vae.config.shift_factor", "", POLICIES),
    Fault("firm/policies/sd3.py", "scale * (velocity - negative)", "(scale - 1) * (velocity - negative)", POLICIES),
    Fault("firm/policies/pipe.py", '"lora_alpha": lora.lora_alpha', '"lora_alpha": lora.r', POLICIES),
    Fault("firm/policies/qwen_image_edit.py", "[grid, grid]", "[grid, (2, *grid[1:])]", POLICIES),
    Fault("firm/policies/qwen_image_edit.py", "[:, : latents.shape[1]]", "[:, latents.shape[1] :]", POLICIES),
    Fault("firm/policies/qwen_image_edit.py", "moved.norm(", "velocity.norm(", POLICIES),
    Fault("firm/policies/qwen_image_edit.py", " * std + mean", " * std", POLICIES),
    Fault("firm/policies/qwen_image_edit.py", 'tensors.get("prompt_embeds_mask")', 'tensors.get("mask")', POLICIES),
    Fault("firm/policies/generate.py", 'text="", image=prompt.image', 'text="", image=prompts[0].image', POLICIES),
    Fault("firm/policies/sampler.py", "/ (2 * ratio)", "/ ratio", POLICIES),
    Fault("firm/policies/generate.py", "row[prompt] for prompt in prompts", "0 for prompt in prompts", POLICIES),
    # critics
    Fault(
        "firm/critics/local.py",
        ".logits[:, -1, self._scores]",
        ".logits[:, -2, self._scores]",
        (*CRITICS, "tests/training/test_sft_learns.py"),
    ),
    Fault("firm/critics/encoder.py", "return rows[0][:length], ids", "return rows[0][:length], ids[::-1]", CRITICS),
    Fault("firm/critics/local.py", "scores / self._temperature", "scores", CRITICS),
    Fault("firm/critics/local.py", "logprobs = scores.log_softmax", "logprobs = chosen.log_softmax", CRITICS),
    Fault("firm/critics/local.py", "question_seed(sample, text", "question_seed(0, text", CRITICS),
    Fault("firm/critics/local.py", 'seed_for(seed, "answer", text, *digests)', "seed", CRITICS),
    Fault("firm/critics/local.py", "if len(group) > 1", "if False", SHARED),
    Fault("firm/critics/prefix.py", "copy.deepcopy(self.cache)", "self.cache", SHARED),
    Fault("firm/critics/prefix.py", " - 1 + self.deltas", " - 1", SHARED),
    Fault("firm/critics/prefix.py", '["attention_mask"], mask], 1)', '["attention_mask"], mask * 0 + 1], 1)', SHARED),
    Fault("firm/critics/soft.py", "at_least[1:]", "at_least[:-1]", CRITICS),
    Fault("firm/critics/soft.py", 'whole.rfind("</think>") + 1', "0", CRITICS),
    Fault("firm/critics/soft.py", "offset > 0", "False", CRITICS),
    Fault("firm/critics/soft.py", "tuple(int(text[at]) for at in verdict) !=", "() ==", CRITICS),
    Fault("firm/critics/soft.py", "MIN_MASS <= total", "0 < total", CRITICS),
    Fault("firm/critics/soft.py", "<= 1.01", "< math.inf", CRITICS),
    Fault("firm/critics/soft.py", "m / total for m in", "m for m in", CRITICS),
    Fault("firm/critics/soft.py", "mass[score] += ", "mass[score] = ", CRITICS),
    Fault("firm/critics/soft.py", "len(failed) > len(valid)", "not valid", CRITICS),
    Fault(
        "firm/critics/soft.py", "sum(column) / len(valid) for column", "sum(column) / len(samples) for column", CRITICS
    ),
    Fault("firm/critics/soft.py", "(-counts[s], abs(s - mean), s)", "(-counts[s], s)", CRITICS),
    Fault("firm/critics/judge.py", "range(sample, self._attempts *", "range(0, self._attempts *", CRITICS),
    Fault("firm/critics/judge.py", "* self._num_samples, self._num_samples)", "+ sample)", CRITICS),
    Fault("firm/critics/load.py", '"temperature": config.temperature', '"temperature": 0.0', SERVED),
    Fault("firm/critics/serve.py", "zip(SCORES, probabilities", "zip(SCORES[::-1], probabilities", SERVED),
    Fault("firm/chat/client.py", "if self._config.logprobs:", "if False:", SERVED),
    Fault(
        "firm/chat/journal.py",
        "t if any(map(str.isdigit, t.text)) else (t.text, t.logprob)",
        "(t.text, t.logprob)",
        CHAT,
    ),
    Fault("firm/config/run.py", "self.wants_distributions and not self.critic.gives_distributions", "False", CONFIG),
    Fault("firm/critics/answers.py", "for position in reversed(digits)", "for position in digits", CRITICS),
    Fault("firm/critics/answers.py", "_RATING_LINE if truncated else _RATING", "_RATING", CRITICS),
    Fault(
        "firm/critics/answers.py",
        '    if truncated:\n        return Invalid(reason="truncated", detail=_excerpt(text))\n    text',
        "    text",
        CRITICS,
    ),
    Fault("firm/critics/answers.py", "next(spoilt, min(scores))", "next(spoilt, max(scores))", CRITICS),
    Fault("firm/critics/judge.py", "if attempt else temperature", "if False else temperature", CRITICS),
    Fault("firm/critics/judge.py", "Invalid):\n            break", "Invalid):\n            continue", CRITICS),
    # curation, bench, gate, reward
    Fault("firm/prompts.py", '"test" if seed_for', '"train" if not seed_for', ("tests/unit/test_prompts.py",)),
    Fault("firm/prompts.py", ".casefold()", "", ("tests/unit/test_prompts.py",)),
    Fault("firm/curation/sources.py", "if self.splits.of(prompt) != split", "if False", CURATION),
    Fault("firm/curation/balance.py", "* oversample / w", "/ w", CURATION),
    Fault("firm/curation/sources.py", "if len(set(sizes)) > 1", "if False", CURATION),
    Fault("firm/curation/sources.py", "len(images) > 1 and prompt.image is None", "False", CURATION),
    Fault("firm/curation/rewriting.py", "!= candidate.split", "is None", CURATION),
    Fault("firm/curation/rewriting.py", "assessment=judged[i].assessment", "assessment=new.assessment", CURATION),
    Fault("firm/critics/difference_first.py", "return lines", "continue", CRITICS),
    Fault(
        "firm/curation/examples.py",
        "question(template, judged.prompt)",
        "question(template, judged.prompt) + str(judged.material)",
        CURATION,
    ),
    Fault("firm/critics/answers.py", "None if truncated else _SCORE_LAST", "_SCORE_LAST", CRITICS),
    Fault("firm/critics/answers.py", '"score": _parse_score', '"score": _parse_boxed', CRITICS),
    Fault("firm/critics/agreement.py", "max(reference - 1, 5 - reference)", "0", BENCH),
    Fault(
        "firm/critics/agreement.py", "_mae(valid, num_bootstrap, seed)", "_mae(valid[:1], num_bootstrap, seed)", CRITICS
    ),
    Fault(
        "firm/critics/agreement.py",
        "soft, reference, prompts, num_bootstrap",
        "soft, predicted, prompts, num_bootstrap",
        CRITICS,
    ),
    Fault("firm/config/bench.py", "value <= self.at_most", "value >= self.at_most", BENCH),
    Fault("firm/bench/gate.py", "if rule.dimension else dimensions", "if rule.dimension else dimensions[:1]", BENCH),
    Fault("firm/bench/items.py", "if isinstance(o, Judgement)", "", BENCH),
    Fault("firm/bench/run.py", "indices)[done:]", "indices)", BENCH),
    Fault("firm/bench/run.py", "bench.point_estimate, bench.num", '"score", bench.num', BENCH),
    Fault("firm/bench/run.py", 'load_prompts(config.prompts, "test")', 'load_prompts(config.prompts, "train")', BENCH),
    Fault("firm/bench/scores.py", "(total - score) / (len(scores) - 1)", "total / len(scores)", BENCH),
    Fault("firm/bench/scores.py", "clusters.append((rater, prompt))", "clusters.append((0, prompt))", BENCH),
    Fault("firm/intervals.py", "counts[:, labels]", "counts[:, labels * 0]", BENCH),
    Fault(
        "firm/stats.py", "_constant_errors(weights, r).min(axis=-1)", "_constant_errors(weights, r).max(axis=-1)", BENCH
    ),
    Fault("firm/stats.py", "alike.sum() / 4 + pairs / 2", "np.maximum(alike, 0).sum() / 2", BENCH),
    Fault("firm/config/bench.py", "self.at_least > 0.5", "self.at_least >= 0", CONFIG),
    Fault("firm/config/bench.py", "if rule.source in self.policy_sources", "", CONFIG),
    Fault("firm/config/bench.py", "self.dimension not in (None, dimension)", "False", CONFIG),
    Fault("firm/config/run.py", "if gap not in accepted", "if False", CONFIG),
    Fault("firm/rewards.py", "base * bracket", "bracket", ("tests/unit/test_rewards.py",)),
    Fault("firm/rewards.py", "(score - 1) / 4", "score / 5", ("tests/unit/test_rewards.py",)),
    Fault("firm/evaluate/held_out.py", "f - b for b, f in pairs", "b - f for b, f in pairs", ("tests/unit/evaluate",)),
    Fault("firm/evaluate/held_out.py", "source=sample.policy", 'source="final"', ("tests/unit/evaluate",)),
    Fault("firm/evaluate/held_out.py", "= self.config.bench.point_estimate", '= "score"', ("tests/unit/evaluate",)),
    Fault("firm/report/rounds.py", '("critic", dimension)', '("auditor", dimension)', ("tests/unit/report",)),
    Fault("firm/report/headlines.py", "not rule.holds(row[rule.metric])", "not row", ("tests/unit/report",)),
    Fault("firm/config/bench.py", "value >= self.at_least", "value <= self.at_least", BENCH),
    # rounds
    Fault("firm/config/loading.py", '"seed": seed, ', "", CONFIG),
    Fault("firm/stage.py", "if not _module(stage).STAGE.compares", "if True", ("tests/unit/test_stage_key.py",)),
    Fault(
        "firm/rl/train.py",
        'start / "policy" if start else None',
        "None",
        ("tests/training/test_rl_learns.py::test_a_further_round_starts_from_the_kept_policy",),
    ),
    Fault(
        "firm/sft/train.py",
        'start / "critic" if start else None',
        "None",
        ("tests/training/test_sft_learns.py::test_a_further_round_goes_on_from_the_last_critic",),
    ),
    Fault("firm/bench/run.py", 'load_policy(last / "policy", device) if last else ', "", BENCH),
    Fault("firm/policies/policy.py", "            self._load(start)", "            pass", POLICIES),
    Fault("firm/policies/policy.py", "if width != height", "if False", POLICIES),
    Fault("firm/policies/policy.py", "if not edits and prompt.image is not None", "if False", POLICIES),
    # planted critics
    Fault("tests/planted/critics.py", "[low + 1 - value, value - low]", "[value - low, low + 1 - value]", PLANTED),
    Fault("tests/planted/table.py", "accumulate(self.rewards, max)", "accumulate(self.rewards, min)", PLANTED),
    Fault("tests/planted/table.py", "self.stopped and self.fall < LIMIT", "self.stopped", PLANTED),
    Fault("tests/planted/table.py", "not self.failures and not self.stopped", "not self.failures", PLANTED),
    # the teacher of edits
    Fault("firm/shapes/edit_teacher.py", "(1 - left) * self._something_left()", "1 - left", EDITS),
    Fault("firm/shapes/edit_teacher.py", 'kind not in ("replace", "remove")', "kind is None", EDITS),
    Fault("firm/shapes/edit_teacher.py", "execution <= _MISSED", "execution <= 5", EDITS),
    Fault("firm/shapes/edit_teacher.py", "if name != free", "", EDITS),
    Fault("firm/shapes/comparison.py", "0.95 * _resemblance", "1.05 * _resemblance", EDITS),
    Fault("firm/shapes/comparison.py", "return 1.0", "return 0.0", EDITS),
    Fault("firm/shapes/editing.py", "split), index])", "split)])", EDITS),
    # presets, keys
    Fault("firm/presets/gen-sd35.yaml", "weights: [0.4, 0.6]", "weights: [0.6, 0.4]", CONFIG),
    Fault("firm/presets/gen-sd35.yaml", "group_size: 16", "group_size: 12", CONFIG),
    Fault("firm/config/reward.py", '"weights": [0.4, 0.6]', '"weights": [0.6, 0.4]', ("tests/unit/test_rewards.py",)),
    Fault("firm/stage.py", "for file in section.named_files()", "for file in ()", ("tests/unit/test_stage_key.py",)),
]


def planted(copy: Path, fault: Fault) -> bool:
    """Whether the tests fail with the fault in place; the file is restored."""
    path = copy / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.file} has {text.count(fault.old)} times {fault.old!r}: bring the table up to date")
    path.write_text(text.replace(fault.old, fault.new))
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests]
    try:
        return subprocess.run(command, cwd=copy, env=env, capture_output=True, check=False).returncode == 1
    finally:
        path.write_text(text)


def survivors(chosen: str) -> Iterator[Fault]:
    """Faults in files whose name contains ``chosen`` that no test notices; prints a line per fault."""
    faults = [fault for fault in FAULTS if chosen in fault.file]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".venv", ".git", "runs", "build", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for number, fault in enumerate(faults, 1):
            noticed = planted(copy, fault)
            verdict = "noticed" if noticed else "SURVIVED"
            print(f"{number}/{len(faults)} {verdict}: {fault.file}: {fault.old!r} -> {fault.new!r}", flush=True)
            if not noticed:
                yield fault


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chosen", nargs="?", default="", help="only files whose name contains this")
    left = list(survivors(parser.parse_args().chosen))
    print(f"{len(left)} survived")
    sys.exit(bool(left))
