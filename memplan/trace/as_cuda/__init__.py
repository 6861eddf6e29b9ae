"""Where code on the meta device must behave as it does on CUDA.

`as_cuda(target, recorder)` is the one context that puts everything in place and takes it away again, also
after an error. One module a subject; each says which source or measurement it follows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from memplan.trace.as_cuda.target import CudaTarget
from memplan.trace.recorder import Recorder

__all__ = ["CudaTarget", "as_cuda"]


@contextlib.contextmanager
def as_cuda(target: CudaTarget, recorder: Recorder) -> Iterator[None]:
    """Everything in here runs on meta as it would run on `target`, recorded by `recorder`."""
    from memplan.trace.as_cuda import (
        adapters,
        attention,
        autocast,
        bitsandbytes_kernels,
        bitsandbytes_optimizers,
        devices,
        kernels,
        workspaces,
    )

    parts = (
        devices,
        attention,
        kernels,
        workspaces,
        bitsandbytes_kernels,
        bitsandbytes_optimizers,
        adapters,
    )
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.installed(target, recorder))
        stack.enter_context(autocast.installed())
        stack.enter_context(recorder)
        yield
