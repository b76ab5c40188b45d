"""The faults that `make mutations` plants: the file, what stands there, what is planted, and the tests that notice."""

from typing import NamedTuple

AUDITED = "tests/training/test_rl_learns.py::test_the_average_is_audited_and_kept"
FRESH = "tests/training/test_rl_learns.py::test_candidates_are_audited_on_fresh_prompts_and_noise"
UNRUN = "tests/training/test_rl_learns.py::test_the_old_policy_is_not_run_where_it_is_the_policy"
RL = ("tests/unit/rl", "tests/property/test_nft.py")
TRAINER = (*RL, "tests/training/test_rl_learns.py::test_the_old_policy_follows_after_the_epoch", AUDITED, FRESH)
SHARED_BASE = ("tests/training/test_sharded_base.py",)
PROCESSES = ("tests/training/test_rl_learns.py::test_two_processes_train_as_one",)
DIVIDED = ("tests/training/test_rl_learns.py::test_processes_share_an_audit_and_wait_for_a_slow_judge",)
RESUMED = ("tests/training/test_rl_learns.py::test_an_audit_that_fails_costs_nothing_but_itself",)
TIMED = ("tests/training/test_sft_learns.py::test_a_checkpoint_is_also_taken_when_time_has_passed",)
LOSS = ("tests/unit/sft/test_loss.py",)
SHARDED = ("tests/training/test_sharded.py::test_two_ranks_that_share_the_parameters_train_as_one[all]",)
HELD_OUT = ("tests/training/test_held_out.py::test_they_are_whole_prompts_of_the_test_split",)
PODS = ("tests/integration/test_checkpoint_parts.py::test_each_machine_stores_its_part_and_gets_no_other",)
FILM = ("tests/unit/test_film.py",)
FITS = ("tests/unit/plan/test_fits.py",)
CARD = ("tests/integration/test_reach.py::test_what_a_gpu_holds_is_asked_of_it_or_said",)
VISION = ("tests/training/test_sft_learns.py::test_a_vision_tower_may_stay_as_it_is",)
POLICIES = ("tests/unit/policies",)
ENCODERS = ("tests/unit/policies/test_encoders.py",)
ENCODED = ("tests/unit/rl/test_encoded_once.py",)
EVALUATED = ("tests/unit/evaluate/test_resume.py::test_prompts_are_encoded_once_for_all_policies_of_one_base",)
WAITING = ("tests/unit/plan/test_policy.py::test_encoders_that_wait_are_left_out_but_for_encoding",)
RANKS = ("tests/unit/plan/test_policy.py::test_a_rank_that_shares_the_base_holds_its_share_and_two_blocks",)
CRITICS = ("tests/unit/critics", "tests/property/test_answers_property.py", "tests/property/test_soft_property.py")
CHILD = ("tests/integration/test_critic_child.py",)
FEW = ("tests/unit/rl/test_rollout.py::test_a_group_with_too_few_valid_judgements_is_left_out",)
VERDICT = ("tests/unit/rl/test_verdict.py",)
HELD = ("tests/unit/critics/test_held.py",)
OVERLAP = ("tests/unit/rl/test_overlap.py",)
SHARED = ("tests/unit/critics/test_prefix.py",)
SERVED = ("tests/integration/test_critic_server.py",)
CHAT = ("tests/unit/chat",)
WIRE = ("tests/integration/test_endpoint.py",)
ONCE = ("tests/integration/test_judged_once.py",)
CURATION = ("tests/unit/curation", "tests/property/test_balance.py")
BENCH = ("tests/unit/bench", "tests/unit/test_stats.py")
CONFIG = ("tests/unit/config",)
EDITS = ("tests/unit/shapes/test_edit_teacher.py", "tests/unit/shapes/test_editing.py")
ABLATION = ("tests/unit/ablation",)
EDITED = ("tests/pipelines/test_run.py::test_every_edit_that_is_kept_is_behind_its_own_source",)
ALARMED = ("tests/pipelines/test_run.py::test_copies_are_watched_and_raise_alarms",)
PARTS = (
    "tests/pipelines/test_parts.py::test_the_verdict_on_a_critic_that_was_never_shown_the_policy_is_not_enough_for_rl",
)
PLANTED = ("tests/planted",)
FINE = ("tests/training/test_sft_learns.py::test_steps_smaller_than_bfloat16_can_tell_are_not_lost",)
REACH = ("tests/integration/test_reach.py",)
WATCHED = ("tests/unit/test_metrics.py",)
GPUS = ("tests/unit/test_gpus.py",)
SUBMISSION = ("tests/unit/test_submission.py",)
COMPILED = ("tests/pipelines/test_compile.py",)
K8S = ("tests/unit/launch/k8s",)
CLAIMS = ("tests/integration/test_claims.py",)
LEASES = ("tests/integration/test_leases.py",)
JOBS = ("tests/unit/launch/test_job.py",)
CHECKPOINTS = ("tests/integration/test_checkpoint.py",)
PUBLISHED = ("tests/integration/test_published.py",)
METERED = ("tests/unit/plan/test_meter.py",)
PLANNED = ("tests/unit/plan/test_stages.py",)
TRAINED = ("tests/unit/plan/test_critic.py::test_workers_that_share_a_critic_hold_an_eighth_each",)
REFUSED = ("tests/unit/plan/test_critic.py::test_a_critic_that_cannot_be_gone_through_is_named",)
UPDATED = ("tests/unit/plan/test_policy.py::test_update[tiny-LoRA, checkpointed]",)
SAMPLED = ("tests/unit/plan/test_policy.py::test_sampling[tiny editor-3.0]",)
TLS = ("tests/integration/test_tls.py",)
TABLE = ("tests/unit/storage/test_table.py",)
GIVEN = "tests/integration/test_given.py::"
CHANGED = (f"{GIVEN}test_what_has_changed_since_is_refused_by_its_hash",)


class Fault(NamedTuple):
    """What is planted where, and who should notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = [
    # DiffusionNFT
    Fault("firm/rl/update.py", "sigma = batch.sigmas[:, j]", "sigma = batch.sigmas[:, 0]", RL),
    Fault("firm/rl/update.py", "batch.noise[:, j]", "batch.noise[:, 0]", RL),
    Fault("firm/rl/update.py", 'return self._fixed("reference"', 'return self._fixed("old"', RL),
    Fault("firm/rl/update.py", 'self._fixed("old"', 'self._fixed("policy"', RL),
    Fault("firm/rl/update.py", "on_policy = False", "pass", RL),
    Fault("firm/rl/train.py", ") == 0  # at the last refresh", ") >= 0  # at the last refresh", (UNRUN,)),
    Fault("firm/rl/update.py", '"kl", epoch, inner, i)', '"kl", epoch, inner)', RL),
    Fault("firm/rl/update.py", "local[worth[local]]", "local", RL),
    Fault("firm/rl/nft.py", "kl_loss(v[rows], v_ref) / share", "kl_loss(v[rows], v_ref)", RL),
    Fault("firm/rl/nft.py", "torch.where(mask, advantage.abs(), -1.0)", "advantage.abs()", RL),
    Fault("firm/rl/update.py", '"update", epoch, inner, index', '"update", epoch, index', RL),
    Fault("firm/rl/update.py", '"update", epoch, inner, index', '"update", inner, index', RL),
    Fault("firm/rl/update.py", 'update_average("ema", ema_decay', 'update_average("old", ema_decay', RL),
    Fault("firm/rl/update.py", "count * batch.sigmas.shape[1]", "count", RL),
    Fault("firm/rl/update.py", "sum_gradients(self.sets.trainable, self.ranks)", "pass", PROCESSES),
    Fault("firm/rl/update.py", "on_policy, math.inf", "on_policy, 1", SHARED_BASE),
    Fault(
        "firm/policies/sharding.py", "mesh=mesh, ignored_params=whole)\n    fully", "mesh=mesh)\n    fully", SHARED_BASE
    ),
    Fault("firm/rl/train.py", "config.auditor.num_images < ranks.size", "False", SHARED_BASE),
    Fault("firm/config/rl.py", 'self.sharding == "base" and self.lora is None', "False", SHARED_BASE),
    Fault("firm/dist.py", 'backend="gloo", timeout=PATIENCE', 'backend="gloo", timeout=STEP', DIVIDED),
    Fault("firm/rl/auditor.py", "if self._encoded is None or", "if True or", ENCODED),
    Fault("firm/rl/auditor.py", "or self._encoded[0] != prompts", "", ENCODED),
    Fault("firm/rl/auditor.py", "self.ranks.share(len(drawn))", "range(len(drawn))", DIVIDED),
    Fault("firm/rl/train.py", "or checkpoints.overdue()", "", RESUMED),
    # what is shown, what fits, what trains
    Fault("firm/film.py", "firsts.setdefault(prompt, images)", "firsts[prompt] = images", FILM),
    Fault("firm/film.py", "splitlines(keepends=True)[:keep]", "splitlines(keepends=True)", FILM),
    Fault("firm/plan/fits.py", "plan.bytes_a_gpu + RESERVED > card", "plan.bytes_a_gpu > card", FITS),
    Fault("firm/plan/fits.py", "plan.stage in stages and", "", FITS),
    Fault("firm/reach.py", "config.launch.gpus and (card", "(card", CARD),
    Fault("firm/sft/train.py", "requires_grad_(sft.train_vision)", "requires_grad_(True)", VISION),
    Fault("firm/sft/train.py", "if module in frozen]", "if False]", VISION),
    # training the critic
    Fault("firm/sft/loss.py", "labels[:, 1:]", "labels[:, :-1]", LOSS),
    Fault(
        "firm/sft/loss.py",
        "zip(hidden.split(TOKENS), targets.split(TOKENS)",
        "zip(hidden.split(10**9), targets.split(10**9)",
        LOSS,
    ),
    Fault("firm/sft/train.py", "* self.accelerator.num_processes /", "/", SHARDED),
    Fault("firm/sft/sharding.py", "fully_shard(module, mesh=mesh, mp_policy=policy)", "pass", SHARDED),
    Fault("firm/sft/held_out.py", "reshard(model)", "pass", SHARDED),
    Fault("firm/sft/held_out.py", 'shards_in(data, "test")', 'shards_in(data, "train")', HELD_OUT),
    Fault("firm/sft/held_out.py", 'listed[i]["prompt"]), i)', "i), i)", HELD_OUT),
    Fault("firm/sft/ahead.py", "self._waiting.popleft()", "self._waiting.pop()", ("tests/unit/sft/test_ahead.py",)),
    Fault("firm/launch/job.py", "os._exit(code)", "sys.exit(code)", JOBS),
    Fault(
        "firm/storage/given.py",
        "_size(store, key),",
        "store.size(key),",
        (f"{GIVEN}test_the_size_of_an_image_is_asked_for_once",),
    ),
    Fault("firm/storage/parts.py", "min(wanted.stop, stop)", "stop", SHARDED),
    Fault("firm/storage/checkpoint.py", "self._parts(name, ranks, first_here)", "[]", PODS),
    Fault("firm/launch/job.py", "place_of(name) is not None", "False", PODS),
    Fault(
        "firm/critics/local.py",
        "load_processor(str(folder), config.max_pixels)",
        "load_processor(str(folder))",
        CRITICS,
    ),
    Fault("firm/sft/train.py", "control.should_save |= self.checkpoints.overdue()", "pass", TIMED),
    Fault("firm/rl/rollout.py", 'f"rollout/{epoch}"', '"rollout"', RL),
    Fault("firm/rl/rollout.py", 'policy.using("old")', 'policy.using("policy")', RL),
    Fault("firm/critics/judge.py", "JudgeInput(prompt, with_source(prompt, png))", "JudgeInput(prompt, [png])", RL),
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
    Fault("firm/rl/auditor.py", "for judge in (critic, auditor)", "for judge in (critic, critic)", RL),
    Fault("firm/rl/auditor.py", "d, formula.soft)", "d, True)", RL),
    Fault("firm/rl/auditor.py", "kept = best(choice).epoch", "kept = max(candidates)", RL),
    Fault("firm/rl/train.py", "candidates[audits[-1].epoch]", "candidates[audits[0].epoch]", RL),
    Fault("firm/rl/auditor.py", "look(item.images)", "look(item.images[-1:])", RL),
    Fault("firm/rl/auditor.py", "for d in assessments[0]}", "for d in formula.dimensions}", RL),
    Fault("firm/rl/train.py", "self.config.auditor.stops and", "", RL),
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
    Fault("firm/policies/parameters.py", "now.copy_(value)", "parameter.data = parameter.data.clone()", POLICIES),
    Fault("firm/policies/parameters.py", "module.reshard()", "pass", POLICIES),
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
    Fault("firm/policies/encoders.py", "tensor.data = value  #", "pass  #", ENCODERS),
    Fault("firm/policies/encoders.py", "self.waiting = False", "pass", ENCODERS),
    Fault("firm/policies/sampler.py", "/ (2 * ratio)", "/ ratio", POLICIES),
    Fault("firm/policies/generate.py", "row[prompt] for prompt in prompts", "0 for prompt in prompts", POLICIES),
    Fault(
        "firm/policies/generate.py",
        "        each(parts[-1])\n",
        "    for part in parts:\n        each(part)\n",
        OVERLAP,
    ),
    Fault("firm/critics/calls.py", ", return_when=FIRST_EXCEPTION", "", OVERLAP),
    Fault("firm/critics/judge.py", "isinstance(judge, ChatJudge) and judge.concurrency:", "False:", OVERLAP),
    Fault("firm/rl/rollout.py", "all_valid & enough", "all_valid", FEW),
    Fault("firm/rl/run.py", "verdict.critic != critic", "not verdict.critic", VERDICT),
    Fault("firm/chat/client.py", "error.unanswered and self._silence.lasts(began, str(error))", "False", WIRE),
    Fault("firm/chat/silence.py", "or self._answered > began", "", WIRE),
    Fault("firm/chat/silence.py", "silent_s > self._patience_s", "silent_s > 9 * self._patience_s", WIRE),
    Fault("firm/chat/client.py", "            request.cancel()", "            pass", OVERLAP),
    Fault("firm/chat/client.py", "self._closed.is_set() or ", "", OVERLAP),
    Fault("firm/critics/child.py", "os.killpg(process.pid, signal.SIGKILL)", "process.kill()", CHILD),
    Fault("firm/lifeline.py", "            os.killpg(0, signal.SIGKILL)", "            break", CHILD),
    # critics
    Fault("firm/critics/local.py", "**arguments, use_cache=False", "**arguments", HELD),
    Fault("firm/critics/prefix.py", "_Read(self.cache) if last else", "", HELD),
    Fault(
        "firm/critics/pen.py",
        "*logprobs.topk(min(self._top, logprobs.shape[1]))",
        "*(t[:, : self._top] for t in logprobs.sort(descending=True))",
        HELD,
    ),
    Fault("firm/bench/items.py", ", dimensions=tuple(self.references)", "", BENCH),
    Fault("firm/critics/judge.py", "item.among(self.rubrics)]", "self.rubrics]", CRITICS),
    Fault(
        "firm/critics/local.py",
        ".logits[:, -1, self._scores]",
        ".logits[:, -2, self._scores]",
        (*CRITICS, "tests/training/test_sft_learns.py"),
    ),
    Fault("firm/critics/encoder.py", "return rows[0][:length], ids", "return rows[0][:length], ids[::-1]", CRITICS),
    Fault("firm/critics/pen.py", "scores[i] / manner.temperature", "scores[i]", CRITICS),
    Fault("firm/critics/pen.py", "logprobs = scores.log_softmax", "logprobs = chosen.log_softmax", CRITICS),
    Fault("firm/critics/local.py", "question_seed(sample, text", "question_seed(0, text", CRITICS),
    Fault("firm/critics/local.py", 'seed_for(seed, "answer", text, *digests)', "seed", CRITICS),
    Fault("firm/critics/local.py", "if len(group) > 1", "if False", SHARED),
    Fault("firm/critics/prefix.py", "[copy.copy(layer) for layer in cache.layers]", "cache.layers", SHARED),
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
    Fault("firm/critics/batching.py", "zip(SCORES, probabilities", "zip(SCORES[::-1], probabilities", SERVED),
    Fault("firm/chat/client.py", "if self._config.logprobs:", "if False:", SERVED),
    Fault(
        "firm/chat/journal.py",
        "t if any(map(str.isdigit, t.text)) else (t.text, t.logprob)",
        "(t.text, t.logprob)",
        CHAT,
    ),
    Fault("firm/storage/lines.py", "and sha256(match[2]).encode() == match[1]", "", CHAT),
    Fault("firm/chat/journal.py", "options], sort_keys", "{}], sort_keys", CHAT),
    Fault("firm/chat/messages.py", '"text", valid_unicode(self.text)', '"text", self.text', CHAT),
    Fault("firm/chat/client.py", "asyncio.timeout(timeout)", "asyncio.timeout(20 * timeout)", WIRE),
    Fault("firm/chat/client.py", 'not in ("", "identity")', "is None", WIRE),
    Fault("firm/chat/client.py", "                if len(content) > limit:\n                    break\n", "", WIRE),
    Fault("firm/critics/verdict.py", "(not over and _GOES_ON.match(text, end))", "False", CRITICS),
    Fault("firm/critics/verdict.py", "_COMES_FROM.search(text, max(0, start - _NEARBY), start)", "False", CRITICS),
    Fault("firm/critics/answers.py", "truncated and not leads(text, match.start())", "False", CRITICS),
    Fault("firm/critics/load.py", 'chat=open_chat("critic", endpoint)', "chat=None", ONCE),
    Fault("firm/rl/train.py", "else None, journals)", "else None)", ONCE),
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
    Fault("firm/bench/items.py", "reference=score,", "reference=6 - score,", BENCH),
    Fault("firm/bench/run.py", "expected[len(done) : len(done) + len(batch)]", "expected[: len(batch)]", BENCH),
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
    Fault("firm/config/bench.py", "if gap not in self.gate.accept_gaps", "if False", CONFIG),
    Fault("firm/config/run.py", '*trained, "bench", "auditor")', '*trained, "bench")', CONFIG),
    Fault("firm/bench/run.py", '"gaps": config.bench.open_gaps(config.dimensions), ', "", PARTS),
    Fault("firm/rl/run.py", "if gaps or not verdict.trusted", "if not verdict.trusted", RL),
    Fault("firm/rl/run.py", "if gaps or not verdict.trusted", "if gaps", RL),
    Fault("firm/config/run.py", 'policy.dtype == "float16"', "False", CONFIG),
    Fault("firm/config/run.py", "REWARD in {", "REWARD in {} and {", CONFIG),
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
    Fault("firm/shapes/edit_teacher.py", 'kind in ("replace", "remove")', "kind", EDITS),
    Fault("firm/shapes/edit_teacher.py", "execution <= _MISSED", "execution <= 5", EDITS),
    Fault("firm/shapes/edit_teacher.py", "if name not in free", "", EDITS),
    Fault("firm/shapes/edit_teacher.py", "if wish and found and wish != old", "if wish and found", EDITS),
    Fault("firm/shapes/edit_teacher.py", "if not kind and self", "if self", EDITS),
    Fault("firm/shapes/comparison.py", "(missing & ~behind).sum() <=", "0 <=", EDITS),
    Fault("firm/shapes/comparison.py", "0.95 * _resemblance", "1.05 * _resemblance", EDITS),
    Fault("firm/shapes/comparison.py", "return 1.0", "return 0.0", EDITS),
    Fault("firm/shapes/comparison.py", "return 0.0  # there was none", "return 1.0  # there was none", EDITS),
    Fault("firm/shapes/comparison.py", "if free.mean() < _ENOUGH", "if False", EDITS),
    Fault("firm/shapes/editing.py", "split), index])", "split)])", EDITS),
    # a run of edits
    Fault("firm/bench/run.py", "images=with_source(prompts[i], png)", "images=[png]", EDITED),
    Fault("firm/curation/sources.py", "images=with_source(judged, png)", "images=[png]", EDITED),
    Fault("firm/evaluate/run.py", "if encoder != policy.config", "if True", EVALUATED),
    Fault("firm/evaluate/run.py", "if encoder != policy.config", "if encoder is None", EVALUATED),
    Fault("firm/evaluate/run.py", "images=with_source(prompt, png)", "images=[png]", EDITED),
    Fault("firm/rl/train.py", "for alarm in alarms(lines, monitors))", "for alarm in ())", ALARMED),
    Fault("firm/rl/train.py", '"alarms": float(len(raised))', '"alarms": 0.0', ALARMED),
    Fault("firm/rl/audit.py", "(num_looks(config) + 1) // 2)", "num_looks(config))", RL),
    Fault(
        "firm/evaluate/held_out.py",
        "(REWARD, *self.config.auditor.rubrics)",
        "self.config.auditor.rubrics",
        ("tests/unit/evaluate",),
    ),
    # presets, keys
    Fault("firm/presets/gen-sd35.yaml", "weights: [0.4, 0.6]", "weights: [0.6, 0.4]", CONFIG),
    Fault("firm/presets/gen-sd35.yaml", "group_size: 16", "group_size: 12", CONFIG),
    Fault("firm/config/reward.py", '"weights": [0.4, 0.6]', '"weights": [0.6, 0.4]', ("tests/unit/test_rewards.py",)),
    Fault("firm/stage.py", "for file in section.named_files()", "for file in ()", ("tests/unit/test_stage_key.py",)),
    Fault("firm/locate.py", "parent if spec.parent else", "parent if not spec else", ("tests/unit/test_stage_key.py",)),
    # what a person watches
    Fault("firm/metrics.py", "self._out.publish(BOARD)", "pass", WATCHED),
    Fault("firm/storage/artifacts.py", "(WORK, BOARD, MANIFEST, TIMING)", "(WORK, MANIFEST, TIMING)", WATCHED),
    Fault("firm/chat/traffic.py", "failed = False", "pass", WATCHED),
    # what a run needs
    Fault("firm/gpus.py", "if seen < asked:", "if False:", GPUS),
    Fault("firm/dist.py", "check_gpus(max(", "max(max(", GPUS),
    Fault("firm/launch/local.py", "if config.gpus else {}", "if False else {}", JOBS),
    Fault(
        "firm/launch/k8s/manifest.py",
        'if config.gpus else {}\n    plain |= {"HF',
        'if False else {}\n    plain |= {"HF',
        K8S,
    ),
    Fault("firm/hub.py", "if not here.files:", "if False:", REACH),
    Fault("firm/reach.py", "for model, found in _models(each, left)}", "for model, found in ()}", REACH),
    Fault("firm/reach.py", "_ask(key, judge, message", "(key, judge, message", REACH),
    Fault("firm/reach.py", "not in rubrics or not _users(config, key) & left", "not in rubrics", REACH),
    Fault("firm/reach.py", " or not is_done(stage)}", " or True}", REACH),
    Fault("firm/reach.py", "or has_begun:", "or False:", REACH),
    Fault("firm/hub.py", "in folders and ", "and ", REACH),
    Fault("firm/preflight.py", ', "patience_s": None})', "})", REACH),
    Fault("firm/disk.py", "if total > free:", "if False:", REACH),
    Fault("pipelines/cluster.py", "task.after(*self.reached)", "pass", COMPILED),
    # on a cluster
    Fault("firm/submission.py", "[GPU_TOLERATION] if int(gpus) else []", "[GPU_TOLERATION]", SUBMISSION),
    Fault("firm/submission.py", "os.environ.get(STORE_SECRET_KEY) or STORE_SECRET", "STORE_SECRET", SUBMISSION),
    Fault("pipelines/cluster.py", 'self.found["store_secret"], STORE_KEYS', '"object-store", STORE_KEYS', COMPILED),
    Fault("pipelines/cluster.py", "set_caching_options(False)", "set_caching_options(True)", COMPILED),
    Fault(
        "firm/launch/k8s/manifest.py", "if config.gpus and names.GPU_TOLERATION not", "if names.GPU_TOLERATION not", K8S
    ),
    Fault("firm/launch/k8s/manifest.py", "defaults.get(names.STORE_SECRET_KEY) or names", "names", K8S),
    Fault("firm/launch/k8s/pods.py", "if is_suspended(job) or len(pods)", "if len(pods)", K8S),
    Fault("firm/launch/k8s/pytorchjob.py", "<= deadline_s", "> deadline_s", K8S),
    Fault(
        "firm/launch/k8s/cluster.py", "max(events, key=_time_of, default=None)", "events[0] if events else None", K8S
    ),
    # work that is claimed, resumed and trusted
    Fault("firm/launch/local.py", "pass_fds=held_locks()", "pass_fds=()", JOBS),
    Fault("firm/storage/published.py", "self._remove_unsound()", "pass", PUBLISHED),
    Fault("firm/storage/artifacts.py", "(WORK, BOARD) if small_only else ()", "()", ("tests/integration/test_s3.py",)),
    # what trains is float32
    Fault("firm/policies/policy.py", "parameter.data.float()", "parameter.data", RL),
    Fault("firm/policies/policy.py", ", cache_enabled=False", "", POLICIES),
    Fault("firm/sft/train.py", "check_answers(encoder, critic)\n    check", "check", ("tests/unit/sft",)),
    Fault("firm/sft/sharding.py", "parameter.data.float()", "parameter.data", FINE),
    Fault("firm/sft/train.py", "model.to(getattr(torch, critic.dtype)).save", "model.save", FINE),
    # data of users in S3
    Fault("firm/storage/given.py", "if self._pin and sha256(data) != self._pin", "if False", CHANGED),
    Fault("firm/storage/given.py", "if expected is not None and sha256_file(path) != expected", "if False", CHANGED),
    Fault("firm/storage/pictures.py", "and sha256(data) != pin", "and False", CHANGED),
    Fault(
        "firm/storage/put.py",
        "[name for name in missing if name != path.name]",
        "missing",
        (f"{GIVEN}test_half_of_an_upload_is_not_visible_and_is_gone_on_with",),
    ),
    Fault(
        "firm/stage.py",
        "            _find_data(config)",
        "            pass",
        (f"{GIVEN}test_the_first_stage_finds_what_a_later_one_would_miss",),
    ),
    Fault(
        "firm/cli.py",
        "RunFolder.open(uploaded(config))",
        "RunFolder.open(config)",
        (f"{GIVEN}test_firm_run_starts_with_what_it_has_uploaded",),
    ),
    Fault("firm/config/loading.py", "if not is_remote(file.path) and (", "if False and (", SUBMISSION),
    Fault("firm/submission.py", "read_remote=False", "read_remote=True", SUBMISSION),
    # shards that are read where they are
    Fault("firm/storage/table.py", "self._ends[place] - rows.num_rows", "0", TABLE),
    Fault("firm/storage/shards.py", "metadata=metadata, page_checksum_verification=True", "metadata=metadata", TABLE),
    Fault(
        "firm/launch/job.py",
        'for name in job["streams"] if is_remote(refs[name].uri)',
        "for name in ()",
        ("tests/integration/test_s3_stage.py::test_a_critic_is_trained_on_shards_that_stay_in_s3",),
    ),
    # what others give
    Fault("firm/model_folder.py", '"/" in str(value)', "False", ("tests/integration/test_evil_models.py",)),
    Fault("firm/cli.py", "print(visible(text))", "print(text)", ("tests/integration/test_doctor.py",)),
    Fault("firm/config/loading.py", "or next(number) > MAX_VALUES", "", ("tests/integration/test_odd_input.py",)),
    Fault("firm/bench/run.py", "out.publish(lines)", "pass", ONCE),
    Fault("firm/storage/claims.py", "made and made != found.encode()", "False", CLAIMS),
    Fault("firm/storage/claims.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", CLAIMS),
    Fault("firm/storage/leases.py", "return later != number or age_s <= LEASE_S", "return False", LEASES),
    Fault("firm/storage/leases.py", "ended is None and age_s > LEASE_S", "False", LEASES),
    Fault(
        "firm/storage/leases.py",
        "if not self._store.create(_key(self._number + 1)",
        "if self._store.put(_key(self._number + 1)",
        CLAIMS,
    ),
    Fault("firm/storage/leases.py", "if lease.ready)", ")", CLAIMS),
    Fault("firm/storage/leases.py", "last.sha256 and _is_there(store, last)", "last.sha256", CLAIMS),
    Fault("firm/storage/checkpoint.py", "            if not fault:", "            if True:", CHECKPOINTS),
    Fault("firm/storage/checkpoint.py", "self._restore(name)", "pass", CHECKPOINTS),
    Fault("firm/certificates.py", "(*variables, CA_BUNDLE)", "variables", TLS),
    # Plans
    Fault("firm/plan/meter.py", "self.live[part] -= size\n\n    def __torch", "pass\n\n    def __torch", METERED),
    Fault("firm/plan/meter.py", "return 10 * query.numel()", "return 8 * query.numel()", METERED),
    Fault("firm/plan/critic.py", "{**memory, **_shares(model, workers)}", "memory", TRAINED),
    Fault("firm/plan/policy.py", "enable_gradient_checkpointing()", "eval()", UPDATED),
    Fault("firm/plan/policy.py", "(1 if guidance == 1 else 2)", "1", SAMPLED),
    Fault("firm/plan/origins.py", "except Exception as error:", "except ImportError as error:", REFUSED),
    Fault("firm/plan/policy.py", "self._meter.peak - self.encoders", "self._meter.peak", WAITING),
    Fault("firm/plan/policy.py", "frozen // ranks - sum(blocks)", "frozen // ranks - frozen", RANKS),
    Fault("firm/plan/stages.py", 'rl.sharding == "base" and self.workers > 1', "False", PLANNED),
    Fault("firm/plan/stages.py", "_part(memory, *HELD) + policy.encoders", "_part(memory, *HELD)", PLANNED),
    Fault("firm/plan/stages.py", "* (audited / self.workers)", "* audited", PLANNED),
    Fault("firm/plan/stages.py", "find_family(policy.family, key).check(model, key)", "pass", PLANNED),
]
