"""Free blocks and the memory under them: what both kinds of segment share.

Sizes and addresses count units of 512 bytes, the allocator's grain. A free block is one integer, size
before address, so that a pool is a sorted list and `bisect` is torch's best fit with its tie-break.

Constants: c10/core/AllocatorConfig.h in the torch 2.13 wheel; 2.11 has the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import Final, Protocol

from memplan.units import MIB

GRAIN: Final = 9
"""log2 of `kMinBlockSize`, 512 bytes: every block is a multiple of it."""
_UNITS_PER_MIB: Final = MIB >> GRAIN
SMALL: Final = _UNITS_PER_MIB
"""`kSmallSize`: requests up to 1 MiB come from the small pool, and a large rest of no more is not cut off."""
SMALL_SEGMENT: Final = 2 * _UNITS_PER_MIB
"""`kSmallBuffer`."""
PACKED: Final = 10 * _UNITS_PER_MIB
"""`kMinLargeAlloc`: large requests below it share segments of `large_segment_size`."""
LARGE_STEP: Final = 2 * _UNITS_PER_MIB
"""`kRoundLarge`: a request from `kMinLargeAlloc` on gets a segment of its own, rounded to 2 MiB."""
SHIFT: Final = 50
ADDRESS: Final = (1 << SHIFT) - 1

Pool = list[int]
"""Keys `size << SHIFT | address` of the free blocks of one pool and stream, ascending."""


class Pools:
    """All pools by stream. Blocks of one never serve another."""

    __slots__ = ("large", "small")

    def __init__(self) -> None:
        self.small: defaultdict[int, Pool] = defaultdict(list)
        self.large: defaultdict[int, Pool] = defaultdict(list)

    def all(self) -> list[Pool]:
        """Every pool, in the order in which torch gives back their memory."""
        return [*self.large.values(), *self.small.values()]


class Blocks:
    """The free blocks of a card by address, and how much is reserved of how much there is."""

    __slots__ = ("allowed", "capacity", "free_end", "free_size", "reserved")

    def __init__(self, capacity: int | None, allowed: int | None) -> None:
        self.free_size: dict[int, int] = {}
        """Start of a free block → its size."""
        self.free_end: dict[int, int] = {}
        """End of a free block → its start."""
        self.reserved = 0
        self.capacity = capacity
        self.allowed = allowed

    def insert(self, pool: Pool, address: int, size: int) -> int:
        """Make a span free, joined with the free blocks that it touches; where the joined block starts."""
        free_size, free_end = self.free_size, self.free_end
        end = address + size
        before = free_end.pop(address, None)
        if before is not None:
            del pool[bisect_left(pool, (address - before) << SHIFT | before)]
            address = before
        after = free_size.pop(end, None)
        if after is not None:
            del pool[bisect_left(pool, after << SHIFT | end)]
            end += after
        size = end - address
        free_size[address] = size
        free_end[end] = address
        insort(pool, size << SHIFT | address)
        return address

    def remove(self, pool: Pool, address: int) -> int:
        """Take a free block out of everything; its size."""
        size = self.free_size.pop(address)
        del self.free_end[address + size]
        del pool[bisect_left(pool, size << SHIFT | address)]
        return size

    def reserve(self, size: int) -> bool:
        """Whether the driver has `size` more, which is then reserved."""
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        return True


class Growth(Protocol):
    """Where blocks come from: `Segments` of cudaMalloc or `ExpandableSegments`."""

    least_rest: int
    """A large block is split if more than this is left of it."""

    def choose(self, pool: Pool, at: int, size: int) -> int:
        """The block in `pool` for `size`, given the best fit's index; `len(pool)` if there is none."""

    def grow(self, pool: Pool, size: int, stream: int) -> int | None:
        """The key of a new block, which is in no pool; None if memory ran out.

        Its address is in `Blocks.free_size` and `free_end` like a free block's.
        """

    def release_cached(self) -> None:
        """Give back to the driver what is entirely free: `torch.cuda.empty_cache()`."""

    def driver_address(self, address: int) -> int:
        """The driver's address, in bytes, of a unit inside a segment."""


def units(size_bytes: int | None) -> int | None:
    """Whole units in a limit; None is none."""
    return None if size_bytes is None else size_bytes >> GRAIN


def segment_size(size: int, large_segment: int) -> int:
    """`get_allocation_size`: the segment that torch asks the driver for to serve `size`."""
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < PACKED:
        return large_segment
    return -(-size // LARGE_STEP) * LARGE_STEP
