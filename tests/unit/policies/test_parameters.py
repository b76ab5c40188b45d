"""Parameter sets: swapped in and out exactly, averaged by the formula, saved and restored."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from firm.policies.parameters import ParameterSets


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    made[0].bias.requires_grad_(False)
    return made


@pytest.fixture
def sets(module: nn.Module) -> ParameterSets:
    """With copies that differ from the policy."""
    made = ParameterSets(module, ("old", "ema"))
    with torch.no_grad():
        for parameter in made.trainable:
            parameter.add_(torch.randn_like(parameter))
    return made


X = torch.ones(5, 3)


def values(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_only_trainable_parameters_are_kept_and_copies_are_independent(module: nn.Module) -> None:
    sets = ParameterSets(module, ("old",))
    assert sets.names == ["0.weight", "1.weight", "1.bias"]
    before = sets.trainable[2].detach().clone()
    with torch.no_grad():
        sets.trainable[2].add_(1)
    assert torch.equal(sets.sets["old"][2], before)


def test_using_evaluates_the_copy_and_restores_the_very_values(module: nn.Module, sets: ParameterSets) -> None:
    before, pointers, live = values(module), [p.data_ptr() for p in sets.trainable], module(X)
    with sets.using("old"):
        assert same([p.data for p in sets.trainable], sets.sets["old"])
        old = module(X)
        assert not old.requires_grad and not torch.is_grad_enabled()
    assert not torch.equal(old, live) and torch.equal(module(X), live) and module(X).requires_grad
    assert same(values(module), before) and [p.data_ptr() for p in sets.trainable] == pointers
    assert all(p.requires_grad for p in sets.trainable)


def test_using_the_policy_keeps_gradients(module: nn.Module, sets: ParameterSets) -> None:
    with sets.using("policy"):
        assert module(X).requires_grad


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_restores(module: nn.Module, sets: ParameterSets, error: type[BaseException]) -> None:
    before = values(module)
    with pytest.raises(error), sets.using("ema"):
        raise error
    assert same(values(module), before) and torch.is_grad_enabled()
    with pytest.raises(KeyError), sets.using("no such set"):
        pass
    assert same(values(module), before)


def test_a_gradient_through_the_policy_survives_a_swap_in_between(module: nn.Module, sets: ParameterSets) -> None:
    module(X).sum().backward()
    expected = [p.grad.clone() for p in sets.trainable if p.grad is not None]
    module.zero_grad()
    loss = module(X).sum()
    with sets.using("old"):
        module(X)
    loss.backward()
    assert same([p.grad for p in sets.trainable if p.grad is not None], expected) and len(expected) == 3


def test_update_average_copies_interpolates_and_stays(sets: ParameterSets) -> None:
    start, live = [t.clone() for t in sets.sets["old"]], [p.detach().clone() for p in sets.trainable]
    sets.update_average("old", 1.0)
    assert same(sets.sets["old"], start)
    sets.update_average("old", 0.25)
    for found, a, b in zip(sets.sets["old"], start, live, strict=True):
        torch.testing.assert_close(found, 0.25 * a + 0.75 * b)
    sets.update_average("old", 0.0)
    assert same(sets.sets["old"], live)
    assert same([p.detach() for p in sets.trainable], live) and same(sets.sets["ema"], start)


def test_what_tensors_gives_load_restores(module: nn.Module, sets: ParameterSets) -> None:
    saved = {k: t.detach().clone() for k, t in sets.tensors().items()}
    assert sorted(saved) == sorted(f"{s}/{n}" for s in ("policy", "old", "ema") for n in sets.names)
    fresh = ParameterSets(module, ("old", "ema"))
    with torch.no_grad():
        for tensor in fresh.tensors().values():
            tensor.zero_()
    fresh.load(saved)
    assert all(torch.equal(t, saved[k]) for k, t in fresh.tensors().items())
    assert torch.equal(module.state_dict()["1.bias"], saved["policy/1.bias"])  # into the module itself


def test_a_copy_is_exact_and_does_not_follow(sets: ParameterSets) -> None:
    sets.update_average("ema", 0.5)
    expected = [t.clone() for t in sets.sets["ema"]]
    assert not same(sets.sets["old"], expected)
    sets.copy("ema", "old")
    sets.update_average("ema", 0.0)
    assert same(sets.sets["old"], expected) and not same(sets.sets["ema"], expected)


@pytest.fixture
def sharded() -> Iterator[nn.Module]:
    """A module sharded with FSDP2 over a group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(made[0], mesh=mesh)
    yield fully_shard(made, mesh=mesh)
    torch.distributed.destroy_process_group()


def test_sets_of_sharded_parameters_are_used_and_leave_again(sharded: nn.Module) -> None:
    sets = ParameterSets(sharded, ("old",))
    assert all(isinstance(p, DTensor) for p in sets.trainable)
    for tensor in sets.sets["old"]:
        tensor.zero_()
    live = sharded(X).detach()
    before = [p.full_tensor().detach().clone() for p in sets.trainable]
    with sets.using("old"):
        assert not sharded(X).any(), "the outputs are still those of the policy"
    assert torch.equal(sharded(X), live) and live.any()
    assert same([p.full_tensor().detach() for p in sets.trainable], before)
    loss = sharded(X).sum()
    with sets.using("old"):
        sharded(X)
    loss.backward()
    assert all(p.grad is not None and p.grad.full_tensor().any() for p in sets.trainable)
    sets.update_average("old", 0.5)
    assert torch.allclose(sets.sets["old"][0], sets.trainable[0].full_tensor() / 2)
    sets.update_average("old", 0)
    with sets.using("old"):
        assert torch.equal(sharded(X), live)
