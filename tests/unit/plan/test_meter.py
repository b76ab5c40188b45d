"""The meter counts what a CPU does, without doing it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared import TINY
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from unit.plan.measured import flops_of, most_allocated, near, slowly

from firm.plan.meter import Meter
from firm.policies.policy import Policy

CPU = torch.device("cpu")


def test_bytes_live_and_die_with_their_tensors() -> None:
    with Meter() as meter:
        a = torch.zeros(1000)
        view = a.view(10, 100)
        b = a + 1
        assert meter.live == {"activations": 8000}
        meter.mark([a], "weights")
        del b
        assert +meter.live == {"weights": 4000} and meter.peak.total() == 8000
        del a
        assert meter.live.total() == 4000  # the view is alive
        del view
        assert meter.live.total() == 0
        meter.reset()
        assert meter.peak.total() == 0


def test_nothing_is_allocated() -> None:
    def work() -> None:
        with Meter() as meter:
            x = torch.randn(20_000, 20_000)
            _ = x @ x
        assert meter.flops == 2 * 20_000**3 and meter.peak.total() == 8 * 20_000**2

    assert most_allocated(work) < 2**20


def test_integers_are_what_they_are() -> None:
    with Meter():
        ids = torch.tensor([3, 1, 3])
        table = torch.randn(5, 4)
        mask = ids == 3
        assert mask.sum().item() == 2 and ids.tolist() == [3, 1, 3]
        rows = table[ids]
        assert rows[mask].shape == (2, 4)
        rows[mask] = rows[mask] + 1
        assert table.masked_scatter(torch.ones(5, 1, dtype=torch.bool), rows).shape == (5, 4)


def test_logits_and_gradients_are_told_apart() -> None:
    with Meter() as meter:
        head = torch.nn.Linear(8, 50, bias=False)
        meter.watch(head)
        meter.vocabulary = 50
        loss = head(torch.randn(4, 8)).square().sum()
        assert meter.live["weights"] == 50 * 8 * 4 and meter.live["logits"] >= 4 * 50 * 4
        loss.backward()
        assert meter.live["gradients"] == 50 * 8 * 4


@pytest.mark.parametrize("shared", [1, 2])
def test_attention_has_the_flops_of_its_products(shared: int) -> None:
    """Those of the implementation by matrix products, for which torch has formulas; backward, once more the first."""

    def work() -> None:
        query = torch.zeros(2, 4, 16, 8, requires_grad=True)
        key, value = (torch.zeros(2, 4 // shared, 24, 8, requires_grad=True) for _ in range(2))
        F.scaled_dot_product_attention(query, key, value, enable_gqa=shared > 1).sum().backward()

    with sdpa_kernel(SDPBackend.MATH):
        products = flops_of(work)
    with Meter() as meter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        work()
    assert meter.flops == products * 7 / 6


@pytest.mark.parametrize(
    ("dtype", "checkpointed"),
    [("bfloat16", False), *slowly([("bfloat16", True), ("float32", False), ("float32", True)])],
)
def test_what_a_forward_pass_keeps_for_the_backward_pass(dtype: str, checkpointed: bool) -> None:
    config = TINY.model_copy(update={"dtype": dtype})

    def forward(policy: Policy) -> Tensor:
        policy.train(None, (), 0)
        if checkpointed:
            policy.family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        return policy.velocity(torch.zeros(8, *policy.latent_shape), torch.ones(8), policy.family.blank(8, 1))

    kept: dict[int, Any] = {}
    real = Policy(config, CPU)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        result = forward(real)
    weights = {p.untyped_storage().data_ptr() for p in real.family.denoiser.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept.values()}
    measured = sum(size for pointer, size in storages.items() if pointer not in weights)
    with Meter() as meter:
        policy = Policy(config, CPU)
        policy.train(None, (), 0)
        meter.watch(policy.family.denoiser)
        planned_result = forward(policy)
        planned = meter.live["activations"]
    assert result.shape == planned_result.shape
    near(f"kept for the backward pass, {dtype}, checkpointed {checkpointed}", planned, measured)
