"""Expandable segments: one a pool and stream, mapped page by page where it has to grow.

Rules: `find_expandable_block`, `try_allocate_expandable_block`, `map_block`, `unmap_block`, `get_free_block`
and `should_split` in https://github.com/pytorch/pytorch/blob/v2.13.0/c10/cuda/CUDACachingAllocator.cpp
Where torch makes a second segment because the first one's addresses (9/8 of the card) are used up, this one
goes on: it has no end.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

from memplan.allocator.blocks import (
    ADDRESS,
    GRAIN,
    SHIFT,
    SMALL,
    SMALL_SEGMENT,
    Blocks,
    Pool,
    segment_size,
    units,
)
from memplan.allocator.conf import AllocConf
from memplan.allocator.segments import fitting

_SPAN: Final = 1 << 40
"""Addresses of one segment, in units: more than any card has."""


class _Segment:
    """The addresses of one pool and stream: some mapped, the rest in `gaps`."""

    __slots__ = ("base", "gaps", "page", "pool")

    def __init__(self, pool: Pool, base: int, page: int) -> None:
        self.pool = pool
        self.base = base
        self.page = page
        self.gaps = [base]
        """Starts of the unmapped spans, ascending; their ends are in `ExpandableSegments._gap_end`."""

    def page_after(self, address: int) -> int:
        """The first page's start at or after `address`."""
        return self.base - (self.base - address) // self.page * self.page

    def page_before(self, address: int) -> int:
        """The last page's start at or before `address`."""
        return self.base + (address - self.base) // self.page * self.page


class ExpandableSegments:
    """The expandable segments of one card."""

    least_rest = 0

    def __init__(self, blocks: Blocks, conf: AllocConf) -> None:
        self._blocks = blocks
        self._large_segment = conf.large_segment_size_bytes >> GRAIN
        self._max_split = units(conf.max_split_size_bytes)
        self._max_rounding = conf.max_non_split_rounding_bytes >> GRAIN
        self._segments: dict[tuple[bool, int], _Segment] = {}
        self._gap_end: dict[int, int] = {}

    def choose(self, pool: Pool, at: int, size: int) -> int:
        """See `Growth`. A block that can grow counts as large as it can grow, so that torch grows it last."""
        gap_end, last = self._gap_end, len(pool) - 1
        while at < last:
            key = pool[at]
            end = (key & ADDRESS) + (key >> SHIFT)
            if end not in gap_end:
                break
            following = pool[at + 1]
            following_end = (following & ADDRESS) + (following >> SHIFT)
            room = gap_end[end] - (key & ADDRESS)
            if gap_end.get(following_end, following_end) - (following & ADDRESS) >= room:
                break
            at += 1
        return fitting(pool, at, size, self._max_split, self._max_rounding)

    def grow(self, pool: Pool, size: int, stream: int) -> int | None:
        """See `Growth`. torch's own cap counts a segment of cudaMalloc, though fewer pages may do."""
        segment = self._segment(pool, size, stream)
        address = self._extend(segment, size)
        if address is None:
            self.release_cached()
            address = self._extend(segment, size)
        if address is None:
            return None
        key = self._blocks.free_size[address] << SHIFT | address
        del pool[bisect_left(pool, key)]
        return key

    def release_cached(self) -> None:
        """See `Growth`: every page without a block in use."""
        for segment in sorted(self._segments.values(), key=lambda segment: segment.page, reverse=True):
            for key in list(segment.pool):
                self._unmap(segment, key & ADDRESS, key >> SHIFT)

    def driver_address(self, address: int) -> int:
        """See `Growth`. Expandable segments lie in the order in which they are first needed."""
        return address << GRAIN

    def _segment(self, pool: Pool, size: int, stream: int) -> _Segment:
        key = (size <= SMALL, stream)
        segment = self._segments.get(key)
        if segment is None:
            base = _SPAN * (len(self._segments) + 1)
            segment = _Segment(pool, base, SMALL_SEGMENT if size <= SMALL else self._large_segment)
            self._segments[key] = segment
            # Spans are apart by one page, so that those of two segments never join.
            self._gap_end[base] = base + _SPAN - segment.page
        return segment

    def _extend(self, segment: _Segment, size: int) -> int | None:
        """Map what is missing for `size` at the lowest address with room; where the free block starts."""
        blocks, gap_end = self._blocks, self._gap_end
        needed = segment_size(size, self._large_segment)
        if blocks.allowed is not None and blocks.reserved + needed > blocks.allowed:
            return None
        address = self._lowest_room(segment, size)
        gap = gap_end.get(address)
        if gap is not None and not self._map(segment, address, min(size, gap - address)):
            return None
        while (found := blocks.free_size[address]) < size:
            gap = address + found
            if not self._map(segment, gap, min(size - found, gap_end[gap] - gap)):
                return None
        return address

    def _lowest_room(self, segment: _Segment, size: int) -> int:
        """Start of the first unbroken run of unmapped and free spans that holds `size`."""
        free_size, gap_end = self._blocks.free_size, self._gap_end
        for gap in segment.gaps:
            start = end = self._blocks.free_end.get(gap, gap)
            while end - start < size:
                if end in gap_end:
                    end = gap_end[end]
                elif end in free_size:
                    end += free_size[end]
                else:
                    break
            else:
                return start
        raise AssertionError("the last gap has room for everything")

    def _map(self, segment: _Segment, gap: int, size: int) -> bool:
        """Put pages under the first `size` of a gap; whether the driver had them."""
        gap_end = self._gap_end
        end = segment.page_after(gap + size)
        if not self._blocks.reserve(end - gap):
            return False
        at = bisect_left(segment.gaps, gap)
        rest = gap_end.pop(gap)
        if end < rest:
            segment.gaps[at] = end
            gap_end[end] = rest
        else:
            del segment.gaps[at]
        self._blocks.insert(segment.pool, gap, end - gap)
        return True

    def _unmap(self, segment: _Segment, address: int, size: int) -> None:
        """Take the whole pages from under a free block; what is left of it at either end stays free."""
        first, last = segment.page_after(address), segment.page_before(address + size)
        if first >= last:
            return
        blocks, gap_end = self._blocks, self._gap_end
        blocks.remove(segment.pool, address)
        if address < first:
            blocks.insert(segment.pool, address, first - address)
        if last < address + size:
            blocks.insert(segment.pool, last, address + size - last)
        blocks.reserved -= last - first
        at = bisect_left(segment.gaps, last)
        if at < len(segment.gaps) and segment.gaps[at] == last:
            last = gap_end.pop(segment.gaps.pop(at))
        if at and gap_end[segment.gaps[at - 1]] == first:
            first = segment.gaps[at - 1]
        else:
            insort(segment.gaps, first)
        gap_end[first] = last
