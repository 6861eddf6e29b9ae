"""The sizes that a message states: each family of wordings has its own words for them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from memplan.diagnosis.types import Figures
from memplan.units import GIB, KIB, MIB, TIB

_UNITS = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": KIB * TIB, "e": MIB * TIB}
_SIZE = r"(\d{1,20}(?:\.\d{1,9})?|\d{1,3}(?:,\d{3}){1,6}) ?(bytes?|[kKMGTPE]?i?b?B|[KMGT]i?)(?![A-Za-z])"
_ABSURD = 1 << 60
"""Nothing holds an exbibyte: a counter has wrapped."""
_DTYPE_BYTES = {
    "float": 4, "half": 2, "bfloat16": 2, "double": 8, "int32": 4, "int64": 8, "bool": 1, "uint8": 1,
    "int8": 1, "int16": 2, "float32": 4, "float16": 2, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


def read(family: str, message: str) -> Figures:
    """The figures of a message whose white space is single spaces."""
    return _FAMILIES[family](message)


def size(number: str, unit: str) -> int | None:
    """Bytes, every unit binary whatever it calls itself; None for what no memory holds."""
    letter = unit[:1].lower()
    factor = _UNITS["" if letter == "b" else letter]
    value = round(float(number.replace(",", "")) * factor)
    return value if value < _ABSURD else None


def _first(message: str, *patterns: str) -> int | None:
    for pattern in patterns:
        match = _compiled(pattern).search(message)
        if match is not None:
            return size(match[1], match[2])
    return None


_PATTERNS: dict[str, re.Pattern[str]] = {}


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern not in _PATTERNS:
        _PATTERNS[pattern] = re.compile(pattern.replace("SIZE", _SIZE))
    return _PATTERNS[pattern]


def _number(message: str, *patterns: str) -> int | None:
    for pattern in patterns:
        match = _compiled(pattern).search(message)
        if match is not None:
            return int(match[1].replace(",", ""))
    return None


_DEVICE = (
    r"\b(?:GPU|XPU|NPU|DCU|device) ?:?(\d{1,4})\b",
    r"\b(?:cuda|hip|xpu|npu):(\d{1,4})\b",
    r"(?:device ordinal|current device:) (\d{1,4})\b",
)


def _torch(message: str) -> Figures:
    allocated = _first(message, "SIZE already allocated", "SIZE is allocated by PyTorch")
    allocated = _first(message, "[Cc]urrently allocated ?: ?SIZE") if allocated is None else allocated
    unallocated = _first(message, "SIZE is reserved by PyTorch but unallocated", r"SIZE cached\)")
    reserved = _first(message, "SIZE reserved in total by PyTorch", r"SIZE cached;")
    process, others = _processes(message, allocated, unallocated)
    return Figures(
        gpu=_number(message, *_DEVICE),
        requested_bytes=_first(message, "[Tt]ried to allocate SIZE", "Requested ?: ?SIZE"),
        total_bytes=_first(
            message, "total capaci?ty of SIZE", "SIZE total capaci?ty", "Device limit ?: ?SIZE"
        ),
        free_bytes=_first(
            message, "of which SIZE is free", r"SIZE free\b", r"Free \(according to CUDA\) ?: ?SIZE"
        ),
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        reserved_unallocated_bytes=unallocated,
        process_bytes=process,
        other_process_bytes=others,
        allowed_bytes=_first(message, "SIZE allowed"),
        private_pools_bytes=_first(message, "with SIZE allocated in private pools"),
    )


def _processes(message: str, allocated: int | None, unallocated: int | None) -> tuple[int | None, int | None]:
    """What this process holds, and the others together; which is which, arithmetic tells in a container."""
    own = _first(message, r"[Tt]his process has SIZE", r"\bProcess has SIZE")
    says_own = re.search(r"[Tt]his process has|\bProcess has", message) is not None
    listed = [
        held
        for _, number, unit in _compiled(r"\bProcess (\d{1,10}) has SIZE").findall(message)
        if (held := size(number, unit)) is not None
    ]
    if says_own or not listed:
        return own, (sum(listed) if listed else None)
    held = (allocated or 0) + (unallocated or 0)
    fitting = [bytes_ for bytes_ in listed if bytes_ >= held * 0.995]
    if allocated is None or not fitting:
        return (listed[0], None) if len(listed) == 1 and allocated is None else (None, sum(listed))
    own = min(fitting)
    others = sum(listed) - own
    return own, (others if len(listed) > 1 else None)


def _mps(message: str) -> Figures:
    return Figures(
        requested_bytes=_first(message, "[Tt]ried to allocate SIZE", "Invalid buffer size: SIZE"),
        total_bytes=_first(message, "max allowed: SIZE"),
        allocated_bytes=_first(message, "MPS allocated: SIZE"),
    )


def _metal(message: str) -> Figures:
    return Figures(
        requested_bytes=_first(message, "(?:Attempting|Unable) to allocate SIZE"),
        total_bytes=_first(message, "maximum allowed buffer size of SIZE"),
    )


def _ggml(message: str) -> Figures:
    return Figures(
        gpu=_number(message, r"on device (\d{1,3})", r"current device: (\d{1,3})", r"\b(?:CUDA|ROCm|Vulkan|SYCL)(\d{1,2}) buffer"),
        requested_bytes=_first(message, "allocating SIZE on device")
        or _first(message, "size = SIZE")
        or _number(message, r"buffers? (?:of size|with size|size) ?=? ?(\d{4,20})\b", r"allocation of size (\d{4,20})"),
    )  # fmt: skip


def _bytes(message: str) -> Figures:
    return Figures(
        requested_bytes=_first(
            message,
            "tried to allocate SIZE",
            "(?:Out of memory|out_of_memory)[^.]{0,40} allocating SIZE",
            r"GPU memory \(SIZE\)",
            "Requested size was SIZE",
            "allocate tensor with SIZE",
            r"attempted to allocate SIZE",
        )
        or _number(message, r"malloc of size (\d{1,20})", r"large alloc (\d{1,20})"),
        allocated_bytes=_first(message, "allocated so far: SIZE"),
        total_bytes=_first(message, "limit set to: SIZE"),
    )


def _numpy(message: str) -> Figures:
    return Figures(requested_bytes=_first(message, "Unable to allocate SIZE"))


def _tensorflow(message: str) -> Figures:
    shape = re.search(r"shape ?\[([\d, ]{1,120})\](?: and type (\w{1,12}))?", message)
    requested = None
    if shape is not None and shape[2] in _DTYPE_BYTES:
        requested = math.prod(int(n) for n in shape[1].split(",") if n.strip()) * _DTYPE_BYTES[shape[2]]
    return Figures(
        gpu=_number(message, r"device:GPU:(\d{1,3})", r"\bGPU_(\d{1,3})_bfc"), requested_bytes=requested
    )


def _xla(message: str) -> Figures:
    return Figures(
        gpu=_number(message, r"device:GPU:(\d{1,3})", r"\bGPU_(\d{1,3})_bfc", r"device ordinal (\d{1,3})"),
        requested_bytes=_number(
            message,
            r"(?:trying to allocate|allocating|allocate)(?: request for)?[^.(]{0,20}\(?(\d{1,20}) ?(?:bytes|B)\b",
            r"\(rounded to (\d{1,20})\)",
            r"\((\d{1,20}) ?(?:bytes|B)\)",
        )
        or _first(
            message,
            "(?:trying to allocate|[Ff]ailed to allocate|request for|Attempting to (?:reserve|allocate)) SIZE",
        ),
        free_bytes=_first(message, "There are SIZE free"),
        total_bytes=_first(message, r"Used [\d.]{1,12}[KMGT]? of SIZE"),
        allocated_bytes=None,
    )


def _paddle(message: str) -> Figures:
    return Figures(
        gpu=_number(message, r"on GPU (\d{1,3})"),
        requested_bytes=_first(
            message,
            "Cannot allocate SIZE memory",
            "Fail to alloc memory of SIZE",
            r"Fail to alloc memory of (\d{1,20}) ()size",
        ),
        free_bytes=_first(message, "available memory is only SIZE"),
        allocated_bytes=_first(message, "SIZE memory has been allocated"),
    )


def _ort(message: str) -> Figures:
    return Figures(
        requested_bytes=_number(
            message, r"requested buffer of size (\d{1,20})", r"requested bytes of (\d{1,20})"
        ),
        free_bytes=_number(message, r"Available memory of (\d{1,20})"),
    )


def _engine(message: str) -> Figures:
    startup = _compiled(
        r"device ?(?:cuda:(\d{1,3}))? ?\((\d{1,6}(?:\.\d{1,4})?) ?/ ?(\d{1,6}(?:\.\d{1,4})?) GiB\)"
    ).search(message)
    if startup is not None:
        return Figures(
            gpu=int(startup[1]) if startup[1] else None,
            free_bytes=size(startup[2], "GiB"),
            total_bytes=size(startup[3], "GiB"),
            requested_bytes=_first(message, r"utilization \([\d.]{1,8}, SIZE\)"),
        )
    return Figures(
        requested_bytes=_first(message, "SIZE (?:of )?KV cache is needed"),
        free_bytes=_first(message, r"available KV cache memory \(?SIZE"),
    )


def _cuda(message: str) -> Figures:
    return Figures(
        gpu=_number(message, r"current device: (\d{1,3})", r"\b(?:GPU|on device|cuda:) ?(\d{1,3})\b"),
        requested_bytes=_first(message, "[Tt]ried to allocate SIZE"),
    )


def _requires(message: str) -> Figures:
    return Figures(
        requested_bytes=_first(message, r"requires more system memory \(SIZE"),
        free_bytes=_first(message, r"than is available \(SIZE"),
    )


def _kernel(message: str) -> Figures:
    return Figures(
        process_bytes=_first(message, "anon-rss:? ?~?SIZE"),
        total_bytes=_first(message, r"memory: usage \d{1,15}kB, limit SIZE"),
    )


def _limit(message: str) -> Figures:
    return Figures(
        total_bytes=_first(
            message,
            r"[Ll]imits?: [^.]{0,60}?memory: {0,4}SIZE",
            r"memory limit(?: of|:)? \(?SIZE",
            r"limit: SIZE",
        )
    )


def _ray(message: str) -> Figures:
    use = _compiled(r"SIZE ?/ ?SIZE").search(message)
    return Figures(
        total_bytes=size(use[3], use[4]) if use else None,
        process_bytes=_first(message, r"(?:worker|actor|task)[^.]{0,60}(?:reported|using|used) [`'\"]?SIZE"),
    )


_FAMILIES: Mapping[str, Callable[[str], Figures]] = {
    "torch": _torch, "mps": _mps, "metal": _metal, "ggml": _ggml, "bytes": _bytes, "numpy": _numpy,
    "tf": _tensorflow, "xla": _xla, "paddle": _paddle, "ort": _ort, "vllm": _engine, "cuda": _cuda,
    "requires": _requires, "kernel": _kernel, "limit": _limit, "ray": _ray, "none": lambda _: Figures(), "nccl": lambda _: Figures(),
}  # fmt: skip
