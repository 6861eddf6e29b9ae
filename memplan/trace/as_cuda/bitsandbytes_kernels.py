"""bitsandbytes' own CUDA code, run on meta.

The file bitsandbytes/backends/cuda/ops.py of the installed version decides which kernel runs, and makes
every buffer, in Python; only the last call of each function enters the C library. It is executed here with
that library replaced by one that does nothing, and its functions serve the recorder as kernels. A newer
version brings its own decisions along.
"""

from __future__ import annotations

import contextlib
import importlib.util
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from memplan.trace.as_cuda.patching import patches
from memplan.trace.as_cuda.target import CudaTarget
from memplan.trace.recorder import Recorder

_BACKENDS = ("default", "cuda")
"""In rising order of preference: what CUDA doesn't define comes from the default backend."""


@contextlib.contextmanager
def installed(target: CudaTarget, recorder: Recorder) -> Iterator[None]:
    """Hand the recorder every operator of bitsandbytes, where that is imported already."""
    import sys

    if "bitsandbytes" not in sys.modules:
        yield
        return
    for name, kernel in load_kernels(target).items():
        recorder.kernels[name] = kernel
    with patches() as patch:
        _quantize_on_meta(patch)
        yield


def load_kernels(target: CudaTarget) -> dict[str, Callable[..., Any]]:
    """Operator name → the function that bitsandbytes registers for CUDA, as on `target`."""
    import bitsandbytes._ops
    import bitsandbytes.cextension
    import bitsandbytes.functional

    found: dict[str, Callable[..., Any]] = {}

    def register_kernel(name: str, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def keep(function: Callable[..., Any]) -> Callable[..., Any]:
            # the default backend compiles some of its functions; what they wrap allocates the same
            found[name] = getattr(function, "__wrapped__", function)
            return function

        return keep

    properties = types.SimpleNamespace(
        multi_processor_count=target.multiprocessor_count,
        major=target.compute_capability[0],
        minor=target.compute_capability[1],
    )
    with patches() as patch:
        patch.set(bitsandbytes._ops, "register_kernel", register_kernel)
        patch.set(bitsandbytes.cextension, "lib", _NoLibrary())
        patch.set(bitsandbytes.functional, "_cuda_device_of", lambda tensor: contextlib.nullcontext())
        patch.set(bitsandbytes.functional, "get_ptr", lambda tensor: None)
        patch.set(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
        for backend in _BACKENDS:
            module = _execute(f"bitsandbytes.backends.{backend}.ops")
            if hasattr(module, "CUBLAS_Context"):
                module.CUBLAS_Context = _NoContext  # type: ignore[attr-defined]
            if hasattr(module, "_gpu_dispatch_props"):
                module._gpu_dispatch_props = lambda index: (  # type: ignore[attr-defined]
                    properties.multi_processor_count,
                    properties.major,
                    properties.minor,
                )
    return found


def _execute(name: str) -> types.ModuleType:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return types.ModuleType(name)
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    module.__file__ = spec.origin
    exec(compile(Path(spec.origin).read_text(), spec.origin, "exec"), module.__dict__)
    return module


class _NoLibrary:
    """The C library: every function takes anything and reports success."""

    compiled_with_cuda = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def succeed(*args: Any) -> int:
            return 0

        return succeed


class _NoContext:
    @classmethod
    def get_instance(cls) -> _NoContext:
        return cls()

    def get_context(self, device: Any) -> None:
        return None


def _quantize_on_meta(patch: Any) -> None:
    # Moving a weight to a device quantizes it, unless that device is meta.
    from bitsandbytes.nn import Int8Params, Params4bit

    move4, move8 = Params4bit.to, Int8Params.to

    def to4(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type == "meta" and not self.bnb_quantized:
            return self._quantize(device)
        return move4(self, *args, **kwargs)

    def to8(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type == "meta" and self.data.dtype != torch.int8:
            return self._quantize(device)
        return move8(self, *args, **kwargs)

    patch.set(Params4bit, "to", to4)
    patch.set(Int8Params, "to", to8)
