"""`PYTORCH_ALLOC_CONF`, read as torch reads it.

Keys, defaults and bounds: `c10/core/AllocatorConfig.h` (in the torch wheel) and `AllocatorConfig.cpp` of
torch 2.13 (https://github.com/pytorch/pytorch/blob/v2.13.0/c10/core/AllocatorConfig.cpp). 2.11 has the
same defaults and no `large_segment_size_mb`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memplan.errors import MemplanError
from memplan.units import MIB

_INTERVALS = 16
"""Power-of-two intervals with divisions of their own: 1 MiB, 2 MiB, ... 32 GiB and above."""
_NEUTRAL_KEYS = frozenset({
    "pinned_use_background_threads", "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb",
    "pinned_use_cuda_host_register", "pinned_use_hip_host_register", "pinned_reserve_segment_size_mb",
    "pinned_num_register_threads", "pinned_free_catch_all", "release_lock_on_cudamalloc",
    "release_lock_on_hipmalloc", "graph_capture_record_stream_reuse", "throw_on_cudamalloc_oom",
})  # fmt: skip
"""Keys that torch knows and that change nothing in what is reserved on the card."""


@dataclass(frozen=True, kw_only=True)
class AllocConf:
    """The allocator's settings. Sizes are bytes; the defaults are torch's."""

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    """Blocks of this size or more are not split, and serve only requests of this size or more."""
    max_non_split_rounding_bytes: int = 20 * MIB
    """How much larger than asked an unsplittable block may be; the segment size unless set."""
    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old cached blocks are given back; 0 is never."""
    roundup_power2_divisions: tuple[int, ...] = ()
    """Divisions between powers of two to which a request is rounded, by interval; empty is off."""
    large_segment_size_bytes: int = 20 * MIB
    """Segment for requests above 1 and below 10 MiB; also the page of a large expandable segment."""
    per_process_memory_fraction: float = 1.0
    """torch's own cap as a share of the card; whoever knows the card turns it into `allowed_bytes`."""

    @classmethod
    def parse(cls, text: str | None) -> AllocConf:
        """The settings in the value of `PYTORCH_ALLOC_CONF`, e.g. `expandable_segments:True`.

        Raises `MemplanError` `bad-alloc-conf` for what torch would refuse, and for the
        `cudaMallocAsync` backend, which is another allocator.
        """
        fields: dict[str, Any] = {}
        for key, value in _pairs(text or ""):
            if key in _READERS:
                field, read = _READERS[key]
                fields[field] = read(key, value)
            elif key == "backend":
                if value != "native":
                    raise _bad(f"backend:{value}", "only torch's native allocator can be replayed")
            elif key not in _NEUTRAL_KEYS:
                raise _bad(
                    key, "torch has no such allocator setting", f"known: {', '.join(sorted(_READERS))}"
                )
        large = fields.get("large_segment_size_bytes", cls.large_segment_size_bytes)
        for field in ("max_split_size_bytes", "max_non_split_rounding_bytes"):
            if fields.get(field, large) < large:
                raise _bad(text or "", f"torch takes no {field[:-6]} below its {large // MIB} MiB segments")
        return cls(**{"max_non_split_rounding_bytes": large, **fields})


def _bad(found: str, why: str, hint: str | None = None) -> MemplanError:
    return MemplanError("bad-alloc-conf", f"PYTORCH_ALLOC_CONF: {found}", context=why, hint=hint)


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """`a:1,b:[2:3,>:4]` as its (key, value) pairs; torch ignores blanks and a comma at the end."""
    rest = re.sub(r"\s+", "", text)
    while rest:
        match = re.match(r"([^:,\[\]]+):(\[[^\[\]]*\]|[^:,\[\]]+)(,|$)", rest)
        if match is None:
            raise _bad(rest, "expected key:value pairs with commas between them")
        yield match[1], match[2]
        rest = rest[match.end() :]


def _read_bool(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise _bad(f"{key}:{value}", "torch takes True or False here, with a capital")
    return value == "True"


def _read_int(key: str, value: str) -> int:
    if re.fullmatch(r"[0-9]{1,18}", value) is None:
        raise _bad(f"{key}:{value}", "expected a whole number")
    return int(value)


def _read_mib(key: str, value: str) -> int:
    return _read_int(key, value) * MIB


def _read_segment_size(key: str, value: str) -> int:
    size_bytes = _read_mib(key, value)
    if size_bytes <= 10 * MIB:
        raise _bad(f"{key}:{value}", "torch takes only segments of more than 10 MiB")
    return size_bytes


def _read_share(key: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        raise _bad(f"{key}:{value}", "expected a number") from None
    highest_allowed = key == "per_process_memory_fraction"
    if not (0 < share < 1 or (highest_allowed and share in (0, 1))):
        raise _bad(f"{key}:{value}", "expected a share between 0 and 1")
    return share


def _read_divisions(key: str, value: str) -> tuple[int, ...]:
    """One number for all intervals, or a list `[256:1,512:2,>:4]` with the upper ones after `>`."""
    if not value.startswith("["):
        divisions = _read_power_of_two(key, value)
        return (divisions,) * _INTERVALS
    table = [0] * _INTERVALS
    last: int | None = None
    for entry in filter(None, value[1:-1].split(",")):
        boundary, colon, number = entry.partition(":")
        if not colon:
            raise _bad(f"{key}:{entry}", "expected size:divisions")
        divisions = 0 if number == "0" else _read_power_of_two(key, number)
        if boundary == ">":
            # torch counts from the second interval where no boundary came before.
            rest = (last or 0) + 1
            table[rest:] = [divisions] * (_INTERVALS - rest)
            continue
        index = min(_read_power_of_two(key, boundary).bit_length() - 1, _INTERVALS - 1)
        if last is None:
            table[:index] = [divisions] * index
        table[index] = divisions
        last = index
    return tuple(table) if any(table) else ()


def _read_power_of_two(key: str, value: str) -> int:
    number = _read_int(key, value)
    if number < 1 or number & (number - 1):
        raise _bad(f"{key}:{value}", "expected a power of two")
    return number


_READERS: dict[str, tuple[str, Any]] = {
    "expandable_segments": ("expandable_segments", _read_bool),
    "max_split_size_mb": ("max_split_size_bytes", _read_mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _read_mib),
    "garbage_collection_threshold": ("garbage_collection_threshold", _read_share),
    "roundup_power2_divisions": ("roundup_power2_divisions", _read_divisions),
    "large_segment_size_mb": ("large_segment_size_bytes", _read_segment_size),
    "per_process_memory_fraction": ("per_process_memory_fraction", _read_share),
}
