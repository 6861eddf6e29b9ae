"""The figures of a message: which sizes it states, in bytes, and of which card.

Sizes count in 1024s whatever they are called: torch and the drivers print binary units, also where old
releases wrote `GB`. What a message doesn't state stays None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from memplan.diagnosis.types import Figures, Kind
from memplan.diagnosis.wordings import SIZE, compiled

_UNITS = {unit: 1 << (10 * power) for power, unit in enumerate("bkmgtpe")}
_LARGEST = 1 << 59
"""Beyond this a figure is an overflow: WSL's NVML answers 2**64 bytes for a process."""
_PARTS = re.compile(r"(-?)(\d[\d,]*)((?:\.\d+)?)\s*([a-z]*)")
_ITEM_BYTES = {
    "double": 8, "int64": 8, "complex64": 8, "float": 4, "float32": 4, "int32": 4, "uint32": 4, "half": 2,
    "bfloat16": 2, "float16": 2, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex128": 16, "float64": 8,
}  # fmt: skip
_S = rf"({SIZE})"
_GPU = (r"\b(?:gpu|npu) (\d{1,3})(?: has a total|;|\))", r"\bon gpu (\d{1,3})\b", r"device:gpu:(\d{1,3})\b")

_TORCH: Mapping[str, tuple[str, ...]] = {
    "gpu": (*_GPU, r"allocation on device (\d{1,3})\b"),
    "requested_bytes": (rf"tried to allocate {_S}", rf"\brequested {{0,20}}: {_S}"),
    "total_bytes": (
        rf"total capac\w{{0,4}} of {_S}",
        rf"{_S} total\b",
        rf"device limit {{0,20}}: {_S}",
    ),
    "free_bytes": (
        rf"free \(according to cuda\) ?: {_S}",
        rf"of which {_S} is free",
        rf"{_S} free\b",
    ),
    "allocated_bytes": (
        rf"allocated memory {_S} is allocated",
        rf"{_S} is allocated by pytorch",
        rf"{_S} already allocated",
        rf"currently allocated {{0,20}}: {_S}",
    ),
    "reserved_bytes": (rf"{_S} reserved in total",),
    "reserved_unallocated_bytes": (rf"{_S} is reserved by pytorch but", rf"{_S} cached"),
    "allowed_bytes": (rf"{_S} allowed\b", rf"user-supplied memory fraction\) ?: {_S}"),
}
_PATTERNS: Mapping[Kind, Mapping[str, tuple[str, ...]]] = {
    "cuda_oom": _TORCH,
    "hip_oom": _TORCH,
    "xpu_oom": _TORCH,
    "npu_oom": _TORCH,
    "mps_oom": {
        "requested_bytes": (rf"tried to allocate {_S}", rf"invalid buffer size: {_S}"),
        "total_bytes": (rf"max allowed: {_S}",),
        "allocated_bytes": (rf"mps allocated: {_S}",),
    },
    "metal_oom": {
        "requested_bytes": (rf"attempting to allocate {_S}",),
        "total_bytes": (rf"(?:maximum allowed buffer size|limit) of {_S}",),
    },
    "cupy_oom": {
        "requested_bytes": (rf"out of memory allocating {_S}",),
        "allocated_bytes": (rf"allocated so far: {_S}",),
        "total_bytes": (rf"limit set to: {_S}",),
    },
    "ggml_oom": {
        "requested_bytes": (
            r"buffer of size (\d{1,20})\b",
            rf"allocating {_S} on device",
            rf"failed to allocate {_S}",
        ),
        "gpu": (
            r"on device (\d{1,3})\b",
            r"\b(?:cuda|rocm|vulkan|sycl)(\d{1,3})\b",
            r"current device: (\d{1,3})\b",
        ),
    },
    "jax_oom": {
        "requested_bytes": (
            rf"trying to allocate {_S}",
            rf"(?:attempting to allocate|failed to allocate request for|out of memory allocating) {_S}",
            r"trying to allocate (\d{5,20})\b",
            rf"used {_S} of {SIZE}",
            r"allocation \(size=(\d{1,20})\)",
        ),
        "total_bytes": (rf"used {SIZE} of {_S}", r"exceed memory \(size=(\d{1,20})\)"),
        "free_bytes": (rf"there are {_S} free", rf"only {_S} (?:free|available)"),
        "gpu": (r"device ordinal (\d{1,3})\b",),
    },
    "tf_oom": {
        "requested_bytes": (rf"trying to allocate {_S}", rf"failed to allocate {_S}"),
        "gpu": (*_GPU, r"allocator \(?gpu_(\d{1,3})_bfc"),
    },
    "paddle_oom": {
        "requested_bytes": (rf"cannot allocate {_S} memory",),
        "free_bytes": (rf"available memory is only {_S}",),
        "allocated_bytes": (rf"{_S} memory has been allocated",),
        "gpu": (r"\bon gpu (\d{1,3})\b",),
    },
    "ort_oom": {
        "requested_bytes": (r"requested buffer of size (\d{1,20})\b", r"requested bytes of (\d{1,20})\b"),
        "free_bytes": (r"available memory of (\d{1,20})\b",),
        "gpu": (r"gpu ?= ?(\d{1,3})\b",),
    },
    "vllm_kv": {
        "requested_bytes": (
            rf"{_S} (?:kv cache|of kv cache|memory) is needed",
            rf"\((?:needs|requires) {_S}",
            rf"gpu memory utilization \(\d?\.?\d{{1,6}}, {_S}",
        ),
        "free_bytes": (
            rf"available kv cache memory(?: \(|: ?){_S}",
            rf"free memory on device (?:\w{{1,8}}:\d{{1,3}} )?\((\d{{1,6}}(?:\.\d{{1,6}})?)/{SIZE}",
        ),
        "total_bytes": (
            rf"free memory on device (?:\w{{1,8}}:\d{{1,3}} )?\([\d.]{{1,12}}(?:-[\d.]{{1,12}})?/{_S}",
        ),
        "gpu": (r"on device cuda:(\d{1,3})\b",),
    },
    "host_oom": {
        "requested_bytes": (rf"(?:tried|want) to allocate {_S}", rf"unable to allocate {_S}"),
        "process_bytes": (rf"anon-rss\W{{1,3}}{_S}",),
        "total_bytes": (
            rf"\bwas {SIZE} / {_S}",
            rf"{SIZE} / {_S} \(0?\.\d{{1,9}}\)",
            rf"\bmemory limit of {_S}",
            rf"\b(?:usage|memory): usage \d{{1,16}}kb, limit {_S}",
        ),
    },
    "cuda_error_oom": {
        "gpu": (
            r"on device cuda:(\d{1,3})\b",
            r"current device: (\d{1,3})\b",
            r"\bgpu (\d{1,3})\b[\w ]{0,20}: ?cuda ",
        )
    },
    "shm": {"requested_bytes": (r"shared memory segment \S{1,80} \(size (\d{1,20})\)",)},
}
_PROCESS = rf"(this process|process(?: \d{{1,12}})?) has {_S}(?: memory)? in use"
BEFORE: Mapping[Kind, int] = {
    "ggml_oom": 200,
    "host_oom": 260,
    "vllm_kv": 120,
    "tf_oom": 0,
    "ort_oom": 120,
    "cuda_error_oom": 30,
}
"""Characters before the recognised words that belong to the message."""


def read_figures(kind: Kind, message: str) -> Figures:
    """What a message of this kind states; it is in lower case and on one line."""
    values: dict[str, int | None] = {}
    for name, patterns in _PATTERNS.get(kind, {}).items():
        for pattern in patterns:
            match = compiled(pattern).search(message)
            if match is not None:
                values[name] = int(match[1]) if name == "gpu" else size_bytes(match[1])
                break
    if kind == "tf_oom" and values.get("requested_bytes") is None:
        values["requested_bytes"] = _tensor_bytes(message)
    if kind == "vllm_kv":
        values["free_bytes"] = _of_a_pair(message, values.get("free_bytes"))
    figures = Figures(**values)
    return _with_processes(figures, message) if kind in ("cuda_oom", "hip_oom", "xpu_oom") else figures


def size_bytes(text: str) -> int | None:
    """Bytes of `1.25 GiB`, `1,610,612,736 bytes` or `512`; None for an overflow."""
    match = _PARTS.match(text)
    if match is None:
        return None
    sign, whole, fraction, unit = match.groups()
    if "," in whole:
        # 1,25 GiB is a decimal comma; 1,610,612,736 groups digits
        head, _, tail = whole.rpartition(",")
        whole = (
            f"{head.replace(',', '')}.{tail}" if len(tail) < 3 and not fraction else whole.replace(",", "")
        )
    factor = _UNITS.get(unit[:1] or "b", 1)
    if factor == 1 and "." not in whole and not fraction:
        value = int(whole)
    else:
        value = round(float(whole + fraction) * factor)
    return None if value >= _LARGEST else -value if sign else value


def _of_a_pair(message: str, free: int | None) -> int | None:
    """vLLM's `(12.18/23.56 GiB)` has one unit for both."""
    match = compiled(r"\((\d{1,6}(?:\.\d{1,6})?)/\d{1,6}(?:\.\d{1,6})? ?([kmgt]i?b)").search(message)
    return size_bytes(match[1] + match[2]) if match else free


def _tensor_bytes(message: str) -> int | None:
    """TensorFlow prints a shape and a type."""
    match = compiled(r"shape ?\[([\d, ]{1,120})\] and type (\w{1,12})").search(message)
    if match is None or match[2] not in _ITEM_BYTES:
        return None
    size = prod(int(n) for n in match[1].split(",") if n.strip()) * _ITEM_BYTES[match[2]]
    return size if size < _LARGEST else None


def _with_processes(figures: Figures, message: str) -> Figures:
    """Who holds what: in a container the process doesn't know its own number, and arithmetic must tell."""
    own: int | None = None
    others: list[int] = []
    for match in compiled(_PROCESS).finditer(message):
        size = size_bytes(match[2])
        if match[1] in ("this process", "process"):
            own = own or size
        elif size is not None:
            others.append(size)
    says_own = compiled(r"this process has").search(message) is not None
    if own is None and not says_own and others and figures.allocated_bytes is not None:
        held = figures.allocated_bytes + (figures.reserved_unallocated_bytes or 0)
        # figures are rounded to two decimals
        able = [size for size in others if size >= held * 0.99]
        if able:
            own = min(able)
            others.remove(own)
    elif own is None and not says_own and len(others) == 1 and _fills_the_card(figures, others[0]):
        own = others.pop()
    return replace(figures, process_bytes=own, other_process_bytes=sum(others) if others else None)


def _fills_the_card(figures: Figures, size: int) -> bool:
    if figures.total_bytes is None or figures.free_bytes is None:
        return False
    return size >= 0.9 * (figures.total_bytes - figures.free_bytes)
