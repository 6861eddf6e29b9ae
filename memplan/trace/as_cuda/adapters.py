"""PEFT makes adapters in host memory and moves each to the card; on meta it leaves them where they are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from memplan.trace.as_cuda.patching import patches
from memplan.trace.as_cuda.target import CudaTarget
from memplan.trace.recorder import Recorder

_MOVE = "_move_adapter_to_device_of_base_layer"


@contextlib.contextmanager
def installed(target: CudaTarget, recorder: Recorder) -> Iterator[None]:
    """Let the move be a birth, in the type of the base layer where that is a float; and so the later upcast."""
    if "peft" not in sys.modules:
        yield
        return
    from peft.tuners import tuners_utils

    upcast = tuners_utils.cast_adapter_dtype

    def move(self: Any, adapter_name: str, device: torch.device | None = None) -> None:
        if hasattr(self, "get_param"):  # an adapter of a bare parameter, such as fused experts
            base_dtype = self.get_param().dtype
        else:
            _, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        floating = base_dtype is not None and base_dtype.is_floating_point
        for name in self.adapter_layer_names + self.other_param_names:
            held = getattr(self, name, None)
            if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) and adapter_name in held:
                item = held[adapter_name]
                for parameter in [item] if isinstance(item, nn.Parameter) else list(item.parameters()):
                    with recorder.resumed():
                        dtype = base_dtype if floating else parameter.dtype
                        parameter.data = torch.empty(parameter.shape, dtype=dtype, device="meta")

    def cast_adapter_dtype(*args: Any, **kwargs: Any) -> None:
        with recorder.resumed():
            upcast(*args, **kwargs)

    with patches() as patch:
        for layer_class in _with_subclasses(tuners_utils.BaseTunerLayer):
            if _MOVE in vars(layer_class):
                patch.set(layer_class, _MOVE, move)
        patch.set_everywhere("peft", "cast_adapter_dtype", upcast, cast_adapter_dtype)
        yield


def _with_subclasses(base: Any) -> Iterator[Any]:
    yield base
    for subclass in base.__subclasses__():
        yield from _with_subclasses(subclass)
