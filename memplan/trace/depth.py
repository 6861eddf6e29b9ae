"""A deep model from a few of its layers: run those, and repeat the record of one for the layers left out.

The model is built, loaded, prepared and optimized at full depth, which is cheap. Its forward and backward
run only the first layers, one period of equal layers (the template), and the last; the layers between are
skipped, their gradients made in host memory. `extend` then puts a copy of the template's events where each
skipped period would have run. A storage is named by its pass, its layer and its place in that layer's
births, so that an event of a copy finds the storages of its own neighbours. Anything that doesn't line up
raises `DepthMismatchError`, and the job is traced at full depth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memplan.trace.recorder import Recorder

_SCALARS = (int, float, str, bool, type(None))
_UNLIKE = ("layer_idx", "layer_id", "idx")
"""Attributes that number a layer and don't make it another kind of layer."""


class DepthMismatchError(Exception):
    """The layers don't repeat as they seemed to."""


@dataclass(frozen=True)
class Depth:
    """Which layers of `owner.name` run. All numbers are indices of layers at full depth."""

    owner: nn.Module
    name: str
    path: str
    """The container's name in the model, e.g. `base_model.model.model.layers`."""
    count: int
    template: range
    """One period of layers, the record of which is repeated."""
    tail: range
    """The last layers, which run after the skipped ones."""

    @property
    def skipped(self) -> range:
        """Layers that don't run."""
        return range(self.template.stop, self.tail.start)

    @property
    def period(self) -> int:
        """Layers in the template."""
        return len(self.template)


def plan_depth(model: nn.Module) -> Depth | None:
    """The layers to run; None where no stack of layers repeats often enough to save anything."""
    found = _largest_stack(model)
    if found is None:
        return None
    owner, name, path = found
    layers = list(getattr(owner, name))
    kinds = [_kind(layer) for layer in layers]
    count = len(layers)
    for period in range(1, count // 4 + 1):
        start = count - period
        while start > 0 and kinds[start - 1] == kinds[start - 1 + period]:
            start -= 1
        first = max(start, 1) + period  # a whole period like the template comes before it
        rest = count - first - period
        tail = rest % period or period
        if rest - tail >= period:
            return Depth(owner, name, path, count, range(first, first + period), range(count - tail, count))
    return None


@contextlib.contextmanager
def shortened(depth: Depth | None, recorder: Recorder) -> Iterator[None]:
    """In here the forward of the model leaves the skipped layers out; backward still gives them gradients."""
    if depth is None:
        yield
        return
    layers: nn.ModuleList = getattr(depth.owner, depth.name)
    kept = [layers[i] for i in range(depth.count) if i not in depth.skipped]
    parameters = [p for i in depth.skipped for p in layers[i].parameters() if p.requires_grad]
    first_of_tail = layers[depth.tail.start]

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_Skip.apply(recorder, args[0], *parameters), *args[1:]), kwargs
        hidden = _Skip.apply(recorder, kwargs["hidden_states"], *parameters)
        return args, {**kwargs, "hidden_states": hidden}

    hook = first_of_tail.register_forward_pre_hook(skip, with_kwargs=True)
    setattr(depth.owner, depth.name, nn.ModuleList(kept))
    try:
        yield
    finally:
        hook.remove()
        setattr(depth.owner, depth.name, layers)


class _Skip(torch.autograd.Function):  # type: ignore[misc]
    """Hands the hidden states on, and in backward a gradient to each parameter that was left out."""

    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.recorder, ctx.parameters = recorder, parameters
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        with ctx.recorder.paused():
            made = [torch.empty_like(parameter) for parameter in ctx.parameters]
        return (None, grads[0], *made)


def layer_of(depth: Depth) -> Callable[[str], int]:
    """Module name → the layer that it belongs to, -1 for none."""
    prefix = depth.path + "."

    def find(module: str) -> int:
        if not module.startswith(prefix):
            return -1
        number = module[len(prefix) :].partition(".")[0]
        return int(number) if number.isdigit() else -1

    return find


def _largest_stack(model: nn.Module) -> tuple[nn.Module, str, str] | None:
    best: tuple[int, nn.Module, str, str] | None = None
    stacks = 0
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 5:
            continue
        if best is not None and path.startswith(best[3] + "."):
            continue  # a list inside a layer
        if len({type(layer) for layer in module}) > 2:
            continue
        stacks += 1
        owner_path, _, name = path.rpartition(".")
        if best is None or len(module) > best[0]:
            best = (len(module), model.get_submodule(owner_path), name, path)
    if best is None or stacks != 1:
        return None
    return best[1:]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What two layers share when they do the same: classes, shapes, types, and plain attributes."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        plain = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, _SCALARS) and key not in _UNLIKE and not key.startswith("_")
        )
        parts.append((name, type(module).__name__, plain))
    for name, parameter in layer.named_parameters():
        parts.append((name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad))
    return tuple(parts)
