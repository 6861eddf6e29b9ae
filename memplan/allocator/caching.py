"""torch's CUDA caching allocator, replayed: which blocks it cuts, keeps and gives back. No torch.

Rules: `DeviceCachingAllocator::malloc`, `round_size`, `should_split`, `alloc_found_block` and `free_block` in
https://github.com/pytorch/pytorch/blob/v2.13.0/c10/cuda/CUDACachingAllocator.cpp
They were read in a copy of main with 2.13's settings; that torch 2.11 on an H100 decides alike is measured:
tests/test_allocator.py replays its histories, address by address, with expandable segments and under caps.
`max_split_size` and garbage collection are from the source alone.

Not replayed: CUDA graphs and private pools. A block that other streams used (`record_stream`) is taken as
free when its owner frees it; torch waits for them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from memplan.allocator.blocks import (
    ADDRESS,
    GRAIN,
    SHIFT,
    SMALL,
    Blocks,
    Growth,
    Pool,
    Pools,
    segment_size,
    units,
)
from memplan.allocator.conf import AllocConf
from memplan.allocator.expandable import ExpandableSegments
from memplan.allocator.layout import LAYOUTS, Layout
from memplan.allocator.segments import Segments
from memplan.units import format_bytes

_NEVER = ADDRESS
"""More than is ever left of a block."""


@dataclass(eq=False)
class OutOfMemory(Exception):  # noqa: N818 - torch's users know it by this name
    """An allocation that failed after the cache was given back.

    `requested_bytes` is the new memory that it needed: the figure after "Tried to allocate" in torch's
    message, which is a whole segment. `limit_bytes` is what refused it.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    limit_bytes: int

    def __str__(self) -> str:
        return (
            f"tried to allocate {format_bytes(self.requested_bytes)} with "
            f"{format_bytes(self.reserved_bytes)} of {format_bytes(self.limit_bytes)} reserved"
        )


class Allocator:
    """One card's allocator. Storages are any integers; one that was freed may come again.

    `capacity_bytes` is what the card has for torch: the driver refuses memory beyond it. `allowed_bytes`
    is torch's own cap (`set_per_process_memory_fraction`), checked before the driver is asked; it alone
    switches `garbage_collection_threshold` on.
    """

    __slots__ = (
        "_conf", "_free_end", "_free_size", "_growth", "_large", "_large_rest", "_max_split",
        "_note_free", "_plain", "_small", "_used", "allocated", "blocks",
    )  # fmt: skip

    def __init__(
        self,
        capacity_bytes: int | None = None,
        conf: AllocConf | None = None,
        layout: Layout = LAYOUTS[0],
        *,
        allowed_bytes: int | None = None,
    ) -> None:
        conf = conf or AllocConf()
        blocks = Blocks(units(capacity_bytes), units(allowed_bytes))
        self._conf = conf
        self.blocks = blocks
        self._free_size = blocks.free_size
        self._free_end = blocks.free_end
        pools = Pools()
        self._small, self._large = pools.small, pools.large
        self._used: dict[int, tuple[int, int, Pool] | None] = {}
        self.allocated = 0
        self._note_free = None
        if conf.expandable_segments:
            self._growth: Growth = ExpandableSegments(blocks, conf)
        else:
            segments = Segments(blocks, pools, conf, layout)
            self._growth = segments
            self._note_free = segments.note_free if segments.ages else None
        # torch splits an expandable block whatever its size.
        self._max_split = None if conf.expandable_segments else units(conf.max_split_size_bytes)
        self._large_rest = self._growth.least_rest
        special = conf.expandable_segments, self._max_split, self._note_free, conf.roundup_power2_divisions
        self._plain = not any(special)

    @property
    def allocated_bytes(self) -> int:
        """`torch.cuda.memory_allocated()`: the blocks in use, with what was too little to cut off."""
        return self.allocated << GRAIN

    @property
    def reserved_bytes(self) -> int:
        """`torch.cuda.memory_reserved()`: what torch holds of the card."""
        return self.blocks.reserved << GRAIN

    def malloc(self, storage: int, size_bytes: int, stream: int = 0) -> int:
        """Give `storage` a block; its size in bytes. Raises `OutOfMemory`. Nothing is taken for 0 bytes."""
        if size_bytes <= 0:
            self._used[storage] = None
            return 0
        size = (size_bytes + 511) >> GRAIN
        if not self._plain:
            size = rounded(size_bytes, self._conf.roundup_power2_divisions)
        if size <= SMALL:
            pool, least_rest = self._small[stream], 0
        else:
            pool, least_rest = self._large[stream], self._large_rest
        at = bisect_left(pool, size << SHIFT)
        if not self._plain:
            at = self._growth.choose(pool, at, size)
            if self._max_split is not None and size >= self._max_split:
                least_rest = _NEVER
        key = pool.pop(at) if at < len(pool) else self._grow(pool, size, stream)
        address = key & ADDRESS
        found = key >> SHIFT
        rest = found - size
        del self._free_size[address]
        if rest > least_rest:
            cut = address + size
            self._free_size[cut] = rest
            self._free_end[address + found] = cut
            insort(pool, rest << SHIFT | cut)
        else:
            size = found
            del self._free_end[address + found]
        self._used[storage] = (address, size, pool)
        self.allocated += size
        return size << GRAIN

    def free(self, storage: int) -> None:
        """Take back the block of `storage`. Raises `KeyError` if it has none."""
        block = self._used.pop(storage)
        if block is None:
            return
        address, size, pool = block
        self.allocated -= size
        address = self.blocks.insert(pool, address, size)
        if self._note_free is not None and size > SMALL:
            self._note_free(address)

    def empty_cache(self) -> None:
        """Give what is entirely free back to the card: `torch.cuda.empty_cache()`."""
        self._growth.release_cached()

    def address(self, storage: int) -> int:
        """Where the block of `storage` lies in the driver's address space, in bytes. It must have one."""
        block = self._used[storage]
        assert block is not None
        return self._growth.driver_address(block[0])

    def _grow(self, pool: Pool, size: int, stream: int) -> int:
        key = self._growth.grow(pool, size, stream)
        if key is None:
            blocks = self.blocks
            limit = min(cap for cap in (blocks.capacity, blocks.allowed) if cap is not None)
            needed = segment_size(size, self._conf.large_segment_size_bytes >> GRAIN)
            raise OutOfMemory(needed << GRAIN, self.allocated_bytes, self.reserved_bytes, limit << GRAIN)
        return key


def rounded(size_bytes: int, divisions: tuple[int, ...]) -> int:
    """`round_size`: units that a request takes, with `roundup_power2_divisions` by its power of two."""
    size = (size_bytes + 511) >> GRAIN
    if not divisions:
        return size
    log2 = size_bytes.bit_length() - 1
    count = divisions[min(max(log2 - 20, 0), len(divisions) - 1)]
    if count <= 1 or size_bytes <= count << GRAIN:
        return size
    step = (1 << log2) // count
    return -(-size_bytes // step) * step >> GRAIN
