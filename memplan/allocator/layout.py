"""Where in the address space the driver puts the segments that the allocator asks it for.

Sizes do not depend on addresses, but choices do: of two free blocks of one size torch takes the lower.
So a replay needs addresses in the order that the driver would have given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from memplan.units import GIB, MIB

_TOP: Final = 1 << 46
_SLOTS: Final = 1 << 20
_CHUNK_BYTES: Final = 32 * MIB
"""Address ranges come in multiples of this. Measured: both histories in tests/measured/events
(H100, driver 580.159.04, CUDA 13.0): a segment that starts a range is aligned to 32 MiB, the next range
lies below it, segments that fit fill the tail of the latest range from the bottom up, then that of the one
before it, and a range without segments is used again from its upper end."""


@dataclass(frozen=True)
class Layout:
    """A rule for addresses. `driver` is as measured; the others bound what another driver may do."""

    order: Literal["driver", "driver-upwards", "falling", "rising", "scattered"] = "driver"

    def open(self) -> AddressSpace:
        """An empty address space under this rule."""
        return AddressSpace(self.order)


LAYOUTS: Final = tuple(
    Layout(order) for order in ("driver", "driver-upwards", "falling", "rising", "scattered")
)
"""The rules that the uncertainty band is taken over; the first is the default."""


@dataclass(eq=False)
class _Range:
    """Addresses that the driver took at once, with what of them is not in a segment."""

    start: int
    size_bytes: int
    holes: dict[int, int]
    """Start → size."""

    def take(self, size_bytes: int) -> int:
        """The lowest hole that holds `size_bytes`; there must be one."""
        start = min(hole for hole, size in self.holes.items() if size >= size_bytes)
        rest = self.holes.pop(start) - size_bytes
        if rest:
            self.holes[start + size_bytes] = rest
        return start


@dataclass(eq=False)
class AddressSpace:
    """The addresses in use under one rule."""

    order: str
    _low: int = _TOP
    _high: int = _TOP
    _slots_used: int = 0
    _with_holes: dict[_Range, int] = field(default_factory=dict)
    """Range → its largest hole, the oldest range first."""
    _ranges: dict[int, _Range] = field(default_factory=dict)
    """Start of a segment → its range."""
    _free: dict[int, int] = field(default_factory=dict)
    """Start → size of ranges that were given back, joined where they touch."""

    def take(self, size_bytes: int) -> int:
        """An address for a segment of `size_bytes`: a multiple of 2 MiB."""
        if self.order == "scattered":
            return self._take_slot()
        if self.order in ("falling", "rising"):
            return self._extend(_whole_pages(size_bytes) + GIB)
        size_bytes = _whole_pages(size_bytes)
        fitting = (owner for owner, hole in reversed(self._with_holes.items()) if hole >= size_bytes)
        owner = next(fitting, None)
        if owner is None:
            range_bytes = -(-size_bytes // _CHUNK_BYTES) * _CHUNK_BYTES
            start = self._take_range(range_bytes)
            owner = _Range(start, range_bytes, {start: range_bytes})
        start = owner.take(size_bytes)
        self._note_holes(owner)
        self._ranges[start] = owner
        return start

    def give_back(self, start: int, size_bytes: int) -> None:
        """The segment at `start` was freed: a hole in its range, or the range's end if it was the last."""
        owner = self._ranges.pop(start, None)
        if owner is None:
            return
        start, size_bytes = _joined(owner.holes, start, _whole_pages(size_bytes))
        if size_bytes < owner.size_bytes:
            owner.holes[start] = size_bytes
            self._note_holes(owner)
            return
        self._with_holes.pop(owner, None)
        start, size_bytes = _joined(self._free, start, size_bytes)
        self._free[start] = size_bytes

    def _note_holes(self, owner: _Range) -> None:
        if owner.holes:
            self._with_holes[owner] = max(owner.holes.values())
        else:
            self._with_holes.pop(owner, None)

    def _take_range(self, size_bytes: int) -> int:
        """From the end that the rule starts at: addresses given back, or else new ones."""
        fitting = [start for start, size in self._free.items() if size >= size_bytes]
        if not fitting:
            return self._extend(size_bytes)
        upwards = self.order == "driver-upwards"
        start = min(fitting) if upwards else max(fitting)
        rest = self._free.pop(start) - size_bytes
        if rest:
            self._free[start + size_bytes if upwards else start] = rest
        return start if upwards else start + rest

    def _extend(self, size_bytes: int) -> int:
        if self.order in ("rising", "driver-upwards"):
            start = self._high
            self._high += size_bytes
            return start
        self._low -= size_bytes
        return self._low

    def _take_slot(self) -> int:
        """The next of 2**20 slots of 256 GiB, each far from the one before: the counter's bits reversed."""
        self._slots_used += 1
        return int(f"{self._slots_used % _SLOTS:020b}"[::-1], 2) * 256 * GIB


def _whole_pages(size_bytes: int) -> int:
    """The driver maps pages of 2 MiB."""
    return -(-size_bytes // (2 * MIB)) * 2 * MIB


def _joined(spans: dict[int, int], start: int, size_bytes: int) -> tuple[int, int]:
    """The span with those that touch it, which leave `spans`."""
    for other, other_bytes in list(spans.items()):
        if other + other_bytes == start:
            del spans[other]
            start, size_bytes = other, size_bytes + other_bytes
        elif start + size_bytes == other:
            del spans[other]
            size_bytes += other_bytes
    return start, size_bytes
