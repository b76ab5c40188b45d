"""Muon and AdamW as one optimizer: who trains what, and that it is nothing but the two of them."""

from copy import deepcopy

import torch
from torch import nn
from torch.optim import AdamW, Muon

from firm.config import SFTConfig
from firm.sft.optimizer import MuonAdamW

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
    matrices = [model.first.weight, model.second.weight]
    decayed = [model.words.weight, model.patches.weight]
    plain = [model.patches.bias, model.first.bias, model.norm.weight, model.norm.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW(groups, lr=0.01, betas=(0.9, 0.98), fused=True),
    ]


def test_it_is_muon_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    one, two = Tiny(), Tiny()
    train(one, [MuonAdamW(one, SFT)], 3)
    train(two, apart(two), 3)
    assert same(one, two) and not same(one, Tiny())


def test_frozen_weights_are_left_alone() -> None:
    model = Tiny()
    model.second.requires_grad_(False)
    train(model, [MuonAdamW(model, SFT)], 2)
    assert torch.equal(model.second.weight, Tiny().second.weight)
    assert not torch.equal(model.first.weight, Tiny().first.weight)


def test_a_loaded_state_and_a_schedule_reach_both() -> None:
    one, two = Tiny(), Tiny()
    first = MuonAdamW(one, SFT)
    train(one, [first], 3)
    two.load_state_dict(one.state_dict())
    second = MuonAdamW(two, SFT)
    second.load_state_dict(deepcopy(first.state_dict()))
    for optimizer in (first, second):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(one, [first], 2, start=3)
    train(two, [second], 2, start=3)
    assert same(one, two)
    before = {name: p.detach().clone() for name, p in two.named_parameters()}
    for group in second.param_groups:
        group["lr"] = 0.0
    train(two, [second], 1)
    assert schedule and all(torch.equal(before[name], p) for name, p in two.named_parameters())
