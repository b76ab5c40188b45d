"""The stop rule: the critic likes what an independent judge does not."""

import pytest

from firm.config import AuditorConfig, PythonChat, RewardConfig, RunConfig
from firm.config.loading import load_config
from firm.records import Assessment, Invalid, Judgement, UserError
from firm.rl.audit import Audit, best, over_optimised
from firm.rl.auditor import audit

JUDGE = PythonChat(target="firm.shapes.teacher:PixelTeacher")


def audits(*pairs: tuple[float, float]) -> list[Audit]:
    """Audits of (reward, auditor) after 0, 10, 20, ... epochs."""
    return [
        Audit(epoch=10 * i, reward=reward, critic=3, auditor=auditor, agreement=None, invalid=0)
        for i, (reward, auditor) in enumerate(pairs)
    ]


def rule(patience: int = 2, tolerance: float = 0.0) -> AuditorConfig:
    return AuditorConfig(
        judge=JUDGE, rubrics={"instruction_following": "evaluate"}, patience=patience, tolerance=tolerance
    )


HACKED = [(0.2, 3.0), (0.4, 3.5), (0.5, 3.4), (0.6, 3.2)]


@pytest.mark.parametrize(
    ("history", "config", "stop"),
    [
        (HACKED[:1], rule(), False),  # the base alone
        (HACKED[:3], rule(), False),  # one bad check is not two
        (HACKED, rule(), True),
        (HACKED, rule(patience=3), False),  # the best itself is no bad check
        (HACKED, rule(tolerance=0.15), False),  # 3.4 is within the tolerance of 3.5
        (HACKED, rule(tolerance=0.05), True),
        ([(0.2, 3.0), (0.4, 3.5), (0.3, 3.2), (0.3, 3.1)], rule(), False),  # both fall: failing, not hacking
        ([(0.2, 3.0), (0.4, 3.5), (0.4, 3.2), (0.4, 3.1)], rule(), True),  # a reward that holds counts as hacking
        ([(0.2, 3.0), (0.4, 2.9), (0.6, 2.8)], rule(), True),  # worse than the base from the start
        ([(0.2, 3.0), (0.4, 3.5), (0.5, 3.4), (0.6, 3.6)], rule(), False),  # recovered
        ([(0.2, 3.0), (0.4, 3.5), (0.6, 3.5), (0.7, 3.5)], rule(), False),  # equal is not lower
        ([(0.2, 3.0), (0.4, 3.1), (0.5, 3.2), (0.6, 3.3)], rule(patience=1), False),
        ([(0.2, 3.0), (0.4, 2.9)], rule(patience=1), True),
    ],
)
def test_when_to_stop(history: list[tuple[float, float]], config: AuditorConfig, stop: bool) -> None:
    assert over_optimised(audits(*history), config) is stop


def test_the_best_is_the_earliest_with_the_highest_auditor_score() -> None:
    assert best(audits((0.1, 3.0), (0.9, 3.5), (0.2, 3.5), (0.95, 3.4))).epoch == 10


# ---- one audit


@pytest.fixture
def config() -> RunConfig:
    return load_config("gen-shapes").model_copy(
        update={"reward": RewardConfig(formula="base_only", base="instruction_following"), "auditor": rule()},
    )


def judged(*scores: int | None) -> list[Assessment]:
    return [
        {"instruction_following": Judgement(score=s) if s else Invalid(reason="empty", detail="nothing said")}
        for s in scores
    ]


def test_an_audit_compares_the_judges_where_both_answered(config: RunConfig) -> None:
    found = audit(7, judged(1, 2, 5, 4, None), judged(1, 3, 4, None, 5), config)
    assert found == Audit(epoch=7, reward=0.5, critic=8 / 3, auditor=8 / 3, agreement=1.0, invalid=2)


@pytest.mark.parametrize(
    ("critic", "auditor"), [((None, None), (1, 2)), ((1, 2), (None, None)), ((1, None), (None, 2))]
)
def test_an_audit_of_nothing_is_an_error(
    config: RunConfig, critic: tuple[int | None, ...], auditor: tuple[int | None, ...]
) -> None:
    with pytest.raises(UserError, match="judged none") as caught:
        audit(0, judged(*critic), judged(*auditor), config)
    assert "nothing said" in str(caught.value)


def test_an_auditor_without_the_rewards_base_is_an_error_for_people(config: RunConfig) -> None:
    other: list[Assessment] = [{"quality": Judgement(score=3)}]
    with pytest.raises(UserError):
        audit(0, judged(3), other, config)
