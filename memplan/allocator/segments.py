"""Segments of cudaMalloc: one a request, cut into blocks, given back only when whole and free.

Rules: `get_free_block`, `alloc_block`, `garbage_collect_cached_blocks`, `release_available_cached_blocks` and
`release_cached_blocks` in https://github.com/pytorch/pytorch/blob/v2.13.0/c10/cuda/CUDACachingAllocator.cpp
"""

from __future__ import annotations

from bisect import bisect_left

from memplan.allocator.blocks import ADDRESS, GRAIN, SHIFT, SMALL, Blocks, Pool, Pools, segment_size, units
from memplan.allocator.conf import AllocConf
from memplan.allocator.layout import Layout

_STRIDE = (1 << 21 - GRAIN) + 1
"""Units between 2 MiB of the driver's addresses and the next: see `_address`."""


class Segments:
    """The segments of one card."""

    least_rest = SMALL

    def __init__(self, blocks: Blocks, pools: Pools, conf: AllocConf, layout: Layout) -> None:
        self._blocks = blocks
        self._pools = pools
        self._addresses = layout.open()
        self._sizes: dict[int, int] = {}
        """Start of a segment → its size."""
        self._large_segment = conf.large_segment_size_bytes >> GRAIN
        self._max_split = units(conf.max_split_size_bytes)
        self._max_rounding = conf.max_non_split_rounding_bytes >> GRAIN
        self._collect_above: int | None = None
        if blocks.allowed is not None and conf.garbage_collection_threshold:
            # A fraction set in torch is what makes it collect; the card's own end does not.
            self._collect_above = int(conf.garbage_collection_threshold * blocks.allowed)
        self._searches = 0
        self._freed_at: dict[int, int] = {}
        """Start of a free large block → how many searches had been made when it became free."""

    @property
    def ages(self) -> bool:
        """Whether the age of free blocks counts, and `note_free` has to be told of them."""
        return self._collect_above is not None

    def note_free(self, address: int) -> None:
        """A large block was freed at `address`."""
        self._freed_at[address] = self._searches

    def choose(self, pool: Pool, at: int, size: int) -> int:
        """See `Growth`. Blocks above `max_split_size` serve only requests about as large."""
        if size > SMALL:
            self._searches += 1
        return fitting(pool, at, size, self._max_split, self._max_rounding)

    def grow(self, pool: Pool, size: int, stream: int) -> int | None:
        """See `Growth`. Before giving up, torch frees cached segments in three rounds, each wider."""
        self._collect_garbage()
        segment = segment_size(size, self._large_segment)
        key = self._new_segment(segment)
        if key is None and self._release_available(pool, size):
            key = self._new_segment(segment)
        if key is None:
            self.release_cached()
            key = self._new_segment(segment)
        return key

    def release_cached(self) -> None:
        """See `Growth`: every segment without a block in use."""
        for pool in self._pools.all():
            for address in self._whole(pool):
                self._release(pool, address)

    def driver_address(self, address: int) -> int:
        """See `Growth`."""
        segment = max(start for start in self._sizes if start <= address)
        return _driver_start(segment) + (address - segment << GRAIN)

    def _whole(self, pool: Pool) -> list[int]:
        """Starts of the segments that are one free block."""
        sizes = self._sizes
        return [key & ADDRESS for key in pool if sizes.get(key & ADDRESS) == key >> SHIFT]

    def _new_segment(self, size: int) -> int | None:
        blocks = self._blocks
        if blocks.allowed is not None and blocks.reserved + size > blocks.allowed:
            return None
        if not blocks.reserve(size):
            return None
        address = _address(self._addresses.take(size << GRAIN))
        self._sizes[address] = size
        blocks.free_size[address] = size
        blocks.free_end[address + size] = address
        return size << SHIFT | address

    def _release(self, pool: Pool, address: int) -> int:
        size = self._blocks.remove(pool, address)
        del self._sizes[address]
        self._freed_at.pop(address, None)
        self._blocks.reserved -= size
        self._addresses.give_back(_driver_start(address), size << GRAIN)
        return size

    def _release_available(self, pool: Pool, size: int) -> bool:
        """Free one cached oversize segment that suffices, or the largest ones until they do."""
        if self._max_split is None:
            return False
        wanted = max(size, self._max_split)
        at = bisect_left(pool, wanted << SHIFT)
        if at < len(pool):
            self._release(pool, pool[at] & ADDRESS)
            return True
        released = 0
        while released < wanted and pool and pool[-1] >> SHIFT >= self._max_split:
            released += self._release(pool, pool[-1] & ADDRESS)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Free cached large segments that have long not served, those above the mean age first."""
        if self._collect_above is None or self._blocks.reserved <= self._collect_above:
            return
        target = self._blocks.reserved - self._collect_above
        whole = [
            (self._searches - self._freed_at[address], pool, address)
            for pool in self._pools.large.values()
            for address in self._whole(pool)
        ]
        reclaimed = 0
        while whole and reclaimed < target:
            total = sum(age for age, _, _ in whole)
            count = len(whole)
            kept = []
            for age, pool, address in whole:
                if age * count >= total:
                    reclaimed += self._release(pool, address)
                else:
                    kept.append((age, pool, address))
            whole = kept


def fitting(pool: Pool, at: int, size: int, max_split: int | None, max_rounding: int) -> int:
    """`at`, or `len(pool)` where the block there is too large to be spent on `size`."""
    if max_split is None or at >= len(pool):
        return at
    found = pool[at] >> SHIFT
    if found >= (max_split if size < max_split else size + max_rounding):
        return len(pool)
    return at


def _address(start: int) -> int:
    """Our address of a segment that the driver put at `start`, a multiple of 2 MiB.

    Segments may touch in the driver's address space, but blocks of two segments never join. One unit more
    for each 2 MiB below keeps the order and leaves a gap.
    """
    return (start >> 21) * _STRIDE


def _driver_start(address: int) -> int:
    """`_address` undone."""
    return address // _STRIDE << 21
