"""bitsandbytes' optimizers on meta: their own code, with paged state kept in host memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from memplan.trace.as_cuda.patching import patches
from memplan.trace.as_cuda.target import CudaTarget
from memplan.trace.recorder import Recorder


@contextlib.contextmanager
def installed(target: CudaTarget, recorder: Recorder) -> Iterator[None]:
    """Let the optimizers make their state on meta, where bitsandbytes is imported already."""
    if "bitsandbytes" not in sys.modules:
        yield
        return
    import bitsandbytes.functional as functional
    import bitsandbytes.optim.optimizer as optimizer

    def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        with recorder.paused():  # managed memory, which torch's allocator doesn't see
            state = torch.empty(*shape, dtype=dtype, device="meta")
        state.is_paged = True
        return state

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    with patches() as patch:
        patch.set(functional, "get_paged", get_paged)
        patch.set(functional, "fill", nothing)
        patch.set(functional, "prefetch_tensor", nothing)
        patch.set(functional, "is_on_gpu", lambda tensors: True)
        patch.set(functional, "name2qmap", {})
        patch.set(optimizer, "sync_gpu", nothing)
        manager = optimizer.GlobalOptimManager
        patch.set(manager, "_instance", None)
        yield
