"""One audit: what the auditor and the critic say of images, and what is seen of them without either."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared import ALONE, CPU, EDITING, POLICIES, TINY

from firm.config import PolicyConfig, RewardConfig, RunConfig
from firm.config.loading import load_config
from firm.config.reward import REWARD
from firm.critics.judge import JudgeInput
from firm.images import encode_image
from firm.looks import look
from firm.policies.policy import Policy
from firm.prompts import load_prompts
from firm.records import Assessment, Invalid, Judgement, Prompt, UserError
from firm.rl.audit import Audit
from firm.rl.auditor import Auditor, shares, values

BASE, BONUS = "instruction_following", "quality"
FORMULA = RewardConfig.model_validate({"formula": "qma"})


@pytest.fixture(scope="module")
def demo() -> RunConfig:
    return load_config("gen-shapes")


def judged(*pairs: tuple[int | None, int | None]) -> list[Assessment]:
    return [
        {
            d: Judgement(score=s) if s else Invalid(reason="empty", detail="nothing said")
            for d, s in zip((BASE, BONUS), pair, strict=True)
        }
        for pair in pairs
    ]


def test_an_image_has_a_reward_where_all_its_judgements_are_valid() -> None:
    found = values(judged((5, 5), (3, 5), (5, None), (None, 2)), FORMULA)
    assert found == {REWARD: (1.0, 0.5, None, None), BASE: (5.0, 3.0, 5.0, None), BONUS: (5.0, 5.0, None, 2.0)}


def test_values_are_soft_where_the_reward_is() -> None:
    unsure = {d: Judgement(score=4, distribution=(0, 0, 0, 0.5, 0.5)) for d in (BASE, BONUS)}
    for soft, score in ((True, 4.5), (False, 4.0)):
        found = values([unsure], FORMULA.model_copy(update={"soft": soft}))
        assert (found[BASE], found[BONUS]) == ((score,), (score,))


class Twos:
    """A critic that gives 2 to everything."""

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        return judged(*[(2, 2)] * len(items))


def test_an_audit_has_the_scores_of_both_judges(demo: RunConfig) -> None:
    rl = demo.rl.model_copy(update={"num_inference_steps": 2})
    config = demo.model_copy(update={"rl": rl, "auditor": demo.auditor.model_copy(update={"num_images": 4})})
    policy = Policy(TINY, CPU)
    policy.train(None, ("ema",), seed=0)
    audit = Auditor(policy, Twos(), load_prompts(config.prompts, "train"), config, ALONE).check(0)
    assert audit.critic[BASE] == audit.critic[BONUS] == (2.0,) * 4
    assert audit.auditor[BASE] != audit.critic[BASE] and audit.auditor[BONUS] != audit.critic[BONUS]
    assert list(audit.seen) == ["blanks"]


def test_an_audit_of_edits_counts_the_copies(demo: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, other = (encode_image(Image.new("RGB", (32, 32), colour)) for colour in ("red", "blue"))
    (tmp_path / "source.png").write_bytes(source)
    monkeypatch.setattr("firm.rl.rollout.generate", lambda *_, each, **__: each(None))
    monkeypatch.setattr("firm.rl.rollout.to_images", lambda *_: [source, other, source, source])
    config = demo.model_copy(update={"auditor": demo.auditor.model_copy(update={"num_images": 4})})
    policy = Policy(PolicyConfig(**POLICIES[EDITING]), CPU)
    policy.train(None, ("ema",), seed=0)
    prompts = [Prompt(text=text, image=str(tmp_path / "source.png")) for text in ("make it blue", "make it green")]
    auditor = Auditor(policy, Twos(), prompts, config, ALONE)
    auditor.judge = Twos()
    assert auditor.check(0).seen == {"copies": 0.75, "blanks": 1.0}


def test_an_audit_of_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="judged none") as caught:
        values(judged((None, 4), (3, None)), FORMULA)
    assert "nothing said" in str(caught.value)


def test_an_auditor_must_judge_all_that_the_reward_is_made_of() -> None:
    with pytest.raises(UserError, match="impossible") as caught:
        load_config("gen-shapes", ["auditor.rubrics={instruction_following: evaluate}"])
    assert "auditor.rubrics" in str(caught.value) and BONUS in str(caught.value)


def test_what_is_no_part_of_the_reward_is_audited_too(demo: RunConfig) -> None:
    config = demo.model_copy(update={"reward": RewardConfig(formula="base_only", base=BASE)})
    auditor = Auditor(None, None, [], config, ALONE)  # type: ignore[arg-type]
    assert list(auditor.judge.rubrics) == [BASE, BONUS]
    found = values(judged((5, 1), (3, None)), config.reward)
    assert found == {REWARD: (1.0, 0.5), BASE: (5.0, 3.0), BONUS: (1.0, None)}


def test_a_dimension_that_nobody_could_judge_has_no_mean() -> None:
    reward = FORMULA.model_copy(update={"formula": "base_only"})
    audit = Audit(epoch=0, prompts=(0,), critic={}, auditor=values(judged((5, None)), reward))
    assert audit.means("auditor") == {REWARD: 1.0, BASE: 5.0, BONUS: None}


def test_an_audit_says_how_many_images_are_copies_or_empty() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    source, edit = (encode_image(Image.fromarray(pixels)) for pixels in (noise, 255 - noise))
    grey = encode_image(Image.new("RGB", (8, 8), "grey"))
    seen = [look(images) for images in ((source, edit), (source, source), (source, source), (source, grey))]
    assert shares(seen) == {"copies": 0.5, "blanks": 0.25}
