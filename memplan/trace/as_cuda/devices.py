"""Tests of a device's name that would send meta down another path than CUDA.

Checked with torch 2.11 and 2.13, transformers 5.17, accelerate 1.15.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._foreach_utils as foreach_utils

from memplan.trace.as_cuda.patching import Patches, patches
from memplan.trace.as_cuda.target import CudaTarget
from memplan.trace.recorder import Recorder

AUTOCAST_DEVICE = "cpu"
"""Autocast has a dispatch key for the CPU and none for meta: the trace autocasts under the CPU's key."""


@contextlib.contextmanager
def installed(target: CudaTarget, recorder: Recorder) -> Iterator[None]:
    """Let meta tensors pass for CUDA tensors, and let no real GPU of this machine change the answer."""
    with patches() as patch:
        _foreach(patch)
        _autocast_names(patch)
        patch.set(torch.cuda, "is_available", lambda: False)
        patch.set(torch.cuda, "empty_cache", recorder.empty_cache)
        yield


def _foreach(patch: Patches) -> None:
    # Optimizers and gradient clipping take their multi-tensor path by a list of device names.
    def foreach_devices() -> list[str]:
        return ["cuda", "meta"]

    def fused_devices() -> list[str]:
        return ["cuda", "meta", "cpu"]

    # torch.optim hides its module `optimizer` behind an attribute that it deletes
    for module in (foreach_utils, importlib.import_module("torch.optim.optimizer")):
        patch.set(module, "_get_foreach_kernels_supported_devices", foreach_devices)
        patch.set(module, "_get_fused_kernels_supported_devices", fused_devices)


def _autocast_names(patch: Patches) -> None:
    is_enabled, get_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    start = torch.amp.autocast_mode.autocast.__init__

    def autocast_init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        start(self, AUTOCAST_DEVICE if device_type in ("meta", "cuda") else device_type, *args, **kwargs)

    patch.set(torch.amp.autocast_mode.autocast, "__init__", autocast_init)
    patch.set(torch, "is_autocast_enabled", lambda device_type=None: is_enabled(AUTOCAST_DEVICE))
    patch.set(torch, "get_autocast_dtype", lambda device_type=None: get_dtype(AUTOCAST_DEVICE))
    generic = sys.modules.get("transformers.utils.generic")
    original = getattr(generic, "maybe_autocast", None)
    if original is None:
        return

    def maybe_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return original(AUTOCAST_DEVICE if device_type == "meta" else device_type, *args, **kwargs)

    patch.set_everywhere("transformers", "maybe_autocast", original, maybe_autocast)
