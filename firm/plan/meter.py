"""What a computation costs, found by going through it with tensors that have a shape but no content."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from firm.model_folder import without_weights

aten = torch.ops.aten
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


def _attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """A product of queries and keys, and one of weights and values; several heads may share keys and values."""
    return 4 * query.numel() * key.shape[-2]


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Five such products, as the weights are computed again."""
    return 10 * query.numel() * key.shape[-2]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""FLOPs of an operation: torch's own formulas, and of the fused attention that it has none for."""


class Meter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all tensors that are alive, by what they are.

    While it is entered, models have no weights, and tensors of floats no content, as if they were on the meta device;
    but they pass for tensors of a CPU, so that autocast and fused attention do what they do. Integers are what they
    are: shapes may depend on them, such as on where the images of a text are. It may be entered again.

    Attributes:
        flops: Since it was reset; a multiplication and an addition are two.
        live: Bytes of the tensors that are alive, by part: "activations", unless they are marked.
        peak: ``live`` when its sum was highest since it was reset.
        vocabulary: Tensors with so many columns are "logits".
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live = Counter[str]()
        self.peak = Counter[str]()
        self.vocabulary = 0
        self._known: dict[int, tuple[str, int]] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        # What it remembers of tensors would keep modules from being moved to another type.
        self._fake.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign]
        self._entered = ExitStack()

    def __enter__(self) -> Meter:
        self._entered.enter_context(warnings.catch_warnings(action="ignore"))  # of tensors without content
        self._entered.enter_context(without_weights())
        self._entered.enter_context(self._fake)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.close()

    def reset(self) -> None:
        """Count from here."""
        self.flops = 0
        self.peak = self.live.copy()

    def mark(self, tensors: Iterable[Tensor], part: str) -> int:
        """Say what tensors are; returns their bytes, each storage once."""
        keys = {self._count(tensor, part) for tensor in tensors}
        for key in keys:
            old, size = self._known[key]
            self.live[old] -= size
            self.live[part] += size
            self._known[key] = (part, size)
        return sum(self._known[key][1] for key in keys)

    def watch(self, model: nn.Module) -> int:
        """Mark a model's weights, and its gradients as they come; returns the bytes of all that is alive."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._mark_gradient)
        total = self.live.total()
        self.live = Counter(weights=total)
        self._known = {key: ("weights", size) for key, (_, size) in self._known.items()}
        return total

    def _mark_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.mark([parameter.grad], "gradients")

    def _count(self, tensor: Tensor, part: str) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = (part, storage.nbytes())
            self.live[part] += storage.nbytes()
            finalize(storage, self._freed, key)
            if self.live.total() > self.peak.total():
                self.peak = self.live.copy()
        return key

    def _freed(self, key: int) -> None:
        part, size = self._known.pop(key)
        self.live[part] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _run(func, args, kwargs)
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
                self._count(tensor, "logits" if logits else "activations")
        return out


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives: for real where nothing but integers and what follows from them goes in."""
    given = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
    if not given or any(isinstance(tensor, FakeTensor) for tensor in given):
        if func in _INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if given or not isinstance(out, Tensor) or out.is_floating_point():
            return out
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Indices with masks as the places that they choose, whose number nothing else would say."""
    places: list[Tensor | None] = []
    with unset_fake_temporarily():
        for index in indices:
            masks = index is not None and index.dtype == torch.bool
            places += index.nonzero().unbind(1) if index is not None and masks else [index]
    return places


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
