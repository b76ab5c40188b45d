"""Muon and AdamW as one optimizer: who trains what, and that it is nothing but the two of them."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from firm.config import SFTConfig
from firm.sft.optimizer import Muon, orthogonal

SFT = SFTConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.1, adam_beta2=0.98)


class Tiny(nn.Module):
    """Embedding, convolution, two linear layers, norm and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.patches = nn.Embedding(5, 4), nn.Conv1d(4, 4, 1)
        self.first, self.second, self.norm = nn.Linear(4, 6), nn.Linear(6, 4, bias=False), nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.words.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.patches(self.words(ids).mT).mT
        return self.head(self.norm(self.second(self.first(x).relu())))


def train(model: Tiny, optimizers: list[torch.optim.Optimizer], steps: int, start: int = 0) -> None:
    for seed in range(start, start + steps):
        ids = torch.randint(5, (2, 7), generator=torch.Generator().manual_seed(seed))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def same(a: Tiny, b: Tiny) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def apart(model: Tiny) -> list[torch.optim.Optimizer]:
    """The two optimizers of torch that it stands for."""
    matrices = [model.first.weight, model.second.weight]
    decayed = [model.words.weight, model.patches.weight]
    plain = [model.patches.bias, model.first.bias, model.norm.weight, model.norm.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), fused=True),
    ]


def test_it_is_muon_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    one, two = Tiny(), Tiny()
    train(one, [Muon(one, SFT)], 3)
    train(two, apart(two), 3)
    for (name, x), y, start in zip(one.named_parameters(), two.parameters(), Tiny().parameters(), strict=True):
        assert not torch.equal(x, start), name
        torch.testing.assert_close(x, y, rtol=0.01, atol=5e-4, msg=name)  # torch's Muon computes in bfloat16


@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20)])
def test_orthogonal_matrices(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert found.shape == shape and (u.T @ found @ v.T).diagonal().sub(1).abs().max() < 0.4


def test_what_is_frozen_or_has_no_gradient_is_left_alone() -> None:
    model = Tiny()
    model.second.requires_grad_(False)
    train(model, [Muon(model, SFT)], 2)
    assert torch.equal(model.second.weight, Tiny().second.weight)
    assert not torch.equal(model.first.weight, Tiny().first.weight)


def test_a_loaded_state_goes_on_as_the_first() -> None:
    one, two = Tiny(), Tiny()
    first, second = Muon(one, SFT), Muon(two, SFT)
    train(one, [first], 3)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(deepcopy(first.state_dict()))
    train(one, [first], 2, start=3)
    train(two, [second], 2, start=3)
    assert same(one, two)


def test_a_schedule_reaches_all() -> None:
    model = Tiny()
    optimizer = Muon(model, SFT)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    train(model, [optimizer], 1)
    assert same(model, Tiny())
