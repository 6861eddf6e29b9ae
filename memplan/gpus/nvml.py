"""The cards of this machine, as NVML tells them; no CUDA context is made and torch is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from memplan.errors import ExitCode, MemplanError
from memplan.gpus.catalogue import match
from memplan.names import printable
from memplan.request.types import CardSpec
from memplan.units import MIB

_HINT = "Name the cards to plan for, e.g. `--gpus 2xRTX4090` or `--gpus 3x23.64GiB`"


def torch_total_bytes(name: str, nvml_total_bytes: int) -> int:
    """What torch will see of a card whose total NVML reports: less, by what the driver keeps.

    The difference is the catalogue's where it knows the card; else 560 MiB and 0.2 %, which covers it on
    every card seen with both figures (see `gpus.json`).
    """
    known = match(name, nvml_total_bytes)
    if known and known.smi_bytes and known.torch_bytes:
        kept = known.smi_bytes - known.torch_bytes
    else:
        kept = 560 * MIB + nvml_total_bytes // 500
    return max(nvml_total_bytes - kept, 0)


def probe_cards() -> tuple[CardSpec, ...]:
    """The cards that a CUDA program started now would see, in its order as far as NVML can tell it.

    `used_bytes` is what other processes hold. `CUDA_VISIBLE_DEVICES` is followed; an index in it counts in
    PCI order, which is CUDA's own only with `CUDA_DEVICE_ORDER=PCI_BUS_ID` or among equal cards.
    Raises `no-gpu-found`.
    """
    try:
        import pynvml
    except ImportError:
        raise _none("The Python package `nvidia-ml-py` is not installed") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _none(f"NVML does not start: {printable(str(error))}") from None
    try:
        found = _visible(pynvml, os.environ)
    except pynvml.NVMLError as error:
        raise _none(f"NVML fails: {printable(str(error))}") from None
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    if not found:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        raise _none("`CUDA_VISIBLE_DEVICES` hides every card" if hidden else "The driver reports no card")
    return found


def _none(context: str) -> MemplanError:
    return MemplanError(
        "no-gpu-found", "no GPU was found on this machine", context, _HINT, exit_code=ExitCode.BAD_INPUT
    )


def _visible(nvml: Any, environment: Mapping[str, str]) -> tuple[CardSpec, ...]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return tuple(_card(nvml, handle) for handle in handles)
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    return tuple(_card(nvml, handles[index]) for index in visible_indices(wanted, uuids))


def visible_indices(wanted: str, uuids: list[str]) -> list[int]:
    """Of `CUDA_VISIBLE_DEVICES`: the indices it selects, in its order, as CUDA and torch read it.

    The first entry that names no card ends the list; a card named twice leaves none.
    """
    taken: list[int] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isascii() and entry.isdigit():
            matching = [int(entry)] if len(entry) < 10 and int(entry) < len(uuids) else []
        else:
            matching = [i for i, uuid in enumerate(uuids) if len(entry) > 4 and uuid.startswith(entry)]
        if len(matching) != 1:
            break
        if matching[0] in taken:
            return []
        taken += matching
    return taken


def _card(nvml: Any, handle: Any) -> CardSpec:
    name = _text(nvml.nvmlDeviceGetName(handle))
    total, used = _memory(nvml, handle)
    known = match(name, total)
    return CardSpec(
        name=name,
        total_bytes=torch_total_bytes(name, total),
        compute_capability=_capability(nvml, handle),
        total_known="probed",
        multiprocessor_count=known.multiprocessor_count if known else None,
        used_bytes=used,
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Total and used bytes; the call's second version keeps the driver's own share out of `used`."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError, AttributeError, TypeError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.total), int(memory.used)


def _capability(nvml: Any, handle: Any) -> tuple[int, int] | None:
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError:
        return None
    return int(major), int(minor)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
