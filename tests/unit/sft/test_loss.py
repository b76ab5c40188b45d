"""The loss of answers is that of the whole model's logits, without them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from firm.config import SFTConfig
from firm.config.loading import load_config
from firm.critics.encoder import Batch, Encoder
from firm.critics.local import load_processor
from firm.images import encode_image
from firm.sft import loss
from firm.sft.loss import only_answers
from firm.sft.train import prepare

CRITIC = load_config("gen-shapes").critic.model_copy(update={"dtype": "float32"})


class Largest(TorchDispatchMode):
    """Size of the largest tensor with a number for each token of the vocabulary, but for the head's weights."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weights = head.in_features, head.out_features
        self.size = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.shape[-1:] == self.weights[1:]]
        self.size = max(self.size, *(t.numel() for t in tensors if t.shape != self.weights), 0)
        return made


@pytest.fixture
def batch() -> Batch:
    """Two questions about an image, with a short answer and a long one."""
    encoder = Encoder(load_processor(CRITIC.model))
    image = encode_image(Image.new("RGB", (32, 32), "red"))
    answers = encoder.answers(["Score: 3", "Score: 4 " + "red circle " * 9])
    return encoder.append(encoder.questions(["<image> red", "<image> two blue"], [[image], [image]]), answers)


def trained(batch: Batch, lora: dict[str, int] | None, change: Callable[[Any], None]) -> tuple[Tensor, Any, int]:
    """Loss, gradients by name and the largest logits of a step."""
    model = prepare(CRITIC, SFTConfig(lora=lora), 0)
    change(model)
    with Largest(model.get_output_embeddings()) as largest:
        found = model(**batch).loss
        found.backward()
    return found.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, largest.size


@pytest.mark.parametrize("tokens", [512, 7])
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["whole", "lora"])
def test_loss_and_gradients_are_those_of_all_logits(
    batch: Batch, lora: dict[str, int] | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "TOKENS", tokens)
    usual, expected, _ = trained(batch, lora, lambda model: None)
    ours, gradients, _ = trained(batch, lora, only_answers)
    count = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(ours / count, usual)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient / count, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_no_more_logits_than_of_a_chunk_are_ever_there(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "TOKENS", 7)
    vocabulary = prepare(CRITIC, SFTConfig(), 0).config.text_config.vocab_size
    _, _, all_logits = trained(batch, None, lambda model: None)
    _, _, largest = trained(batch, None, only_answers)
    assert all_logits == batch["labels"].numel() * vocabulary
    assert largest == 7 * vocabulary
