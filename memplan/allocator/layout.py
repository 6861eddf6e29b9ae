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
lies below it, smaller segments fill its tail from the bottom up, and a freed range is used again from its
upper end."""


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


@dataclass
class AddressSpace:
    """The addresses in use under one rule."""

    order: str
    _low: int = _TOP
    _high: int = _TOP
    _tails: dict[int, int] = field(default_factory=dict)
    """Start → size of what is left of ranges in use."""
    _ranges: dict[int, int] = field(default_factory=dict)
    """Start → size of ranges that were given back, joined where they touch."""
    _slots_used: int = 0

    def take(self, size_bytes: int) -> int:
        """An address for a segment of `size_bytes`, a multiple of 2 MiB."""
        if self.order == "scattered":
            return self._take_slot()
        if self.order in ("falling", "rising"):
            return self._extend(size_bytes + GIB)
        tails = [(size, start) for start, size in self._tails.items() if size >= size_bytes]
        if tails:
            size, start = min(tails)
            del self._tails[start]
        else:
            size = -(-size_bytes // _CHUNK_BYTES) * _CHUNK_BYTES
            start = self._take_range(size)
        if size > size_bytes:
            self._tails[start + size_bytes] = size - size_bytes
        return start

    def give_back(self, start: int, size_bytes: int) -> None:
        """The segment at `start` was freed: whole chunks serve as ranges again, the rest as tails."""
        if self.order not in ("driver", "driver-upwards"):
            return
        start, size_bytes = _joined(self._tails, start, size_bytes)
        end = start + size_bytes
        first = -(-start // _CHUNK_BYTES) * _CHUNK_BYTES
        last = end // _CHUNK_BYTES * _CHUNK_BYTES
        if first >= last:
            self._tails[start] = size_bytes
            return
        if start < first:
            self._tails[start] = first - start
        if last < end:
            self._tails[last] = end - last
        start, size_bytes = _joined(self._ranges, first, last - first)
        self._ranges[start] = size_bytes

    def _take_range(self, size_bytes: int) -> int:
        """From the end that the rule starts at: a range given back, or else a new one."""
        fitting = [start for start, size in self._ranges.items() if size >= size_bytes]
        if not fitting:
            return self._extend(size_bytes)
        upwards = self.order == "driver-upwards"
        start = min(fitting) if upwards else max(fitting)
        size = self._ranges.pop(start)
        if upwards:
            if size > size_bytes:
                self._ranges[start + size_bytes] = size - size_bytes
            return start
        if size > size_bytes:
            self._ranges[start] = size - size_bytes
        return start + size - size_bytes

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
