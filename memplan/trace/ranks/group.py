"""A process group that isn't there: collectives do nothing, memory is allocated as if they did.

`torch.testing._internal.distributed.fake_pg` is torch's own; the module `torch.meta` that it lacks (streams
and events of a device of that name) is put in place for as long as the group exists.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from memplan.trace.as_cuda.patching import patches
from memplan.trace.recorder import Recorder


class _Stream:
    count = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        _Stream.count += 1
        self.number = _Stream.count

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, _: Any = None) -> _Event:
        return self

    def wait(self, _: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def fake_process_group(world_size: int, recorder: Recorder) -> Iterator[None]:
    """Be rank 0 of `world_size`; nothing at all for one process."""
    if world_size <= 1:
        yield
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    current: list[_Stream] = [_Stream()]
    current[0].number = 0
    with patches() as patch:
        module = _device_module(current, world_size)
        patch.set(torch, "meta", module)
        before = sys.modules.get("torch.meta")
        sys.modules["torch.meta"] = module
        recorder.stream = lambda: current[-1].number
        dist.init_process_group(backend="fake", rank=0, world_size=world_size, store=FakeStore())
        try:
            with _quiet_cpp():
                yield
        finally:
            dist.destroy_process_group()
            recorder.stream = None
            if before is None:
                del sys.modules["torch.meta"]
            else:
                sys.modules["torch.meta"] = before


@contextlib.contextmanager
def _quiet_cpp() -> Iterator[None]:
    # DistributedDataParallel's C++ side warns past Python, to file descriptor 2, of a device without timers.
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _device_module(current: list[_Stream], device_count: int) -> types.ModuleType:
    @contextlib.contextmanager
    def stream(chosen: _Stream | None) -> Iterator[None]:
        current.append(chosen or current[-1])
        try:
            yield
        finally:
            current.pop()

    module = types.ModuleType("torch.meta")
    members: dict[str, Any] = {
        "Stream": _Stream,
        "Event": _Event,
        "stream": stream,
        "current_stream": lambda device=None: current[-1],
        "default_stream": lambda device=None: current[0],
        "current_device": lambda: 0,
        "device_count": lambda: device_count,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
    }
    for name, value in members.items():
        setattr(module, name, value)
    return module
