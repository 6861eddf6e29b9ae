"""The caching allocator's rules once more, as plainly as they can be put: the reference for hypothesis.

Blocks are entries of one list a segment, and every search looks at every block. Bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memplan.allocator import AllocConf

KIB, MIB = 1 << 10, 1 << 20
ENDLESS = 1 << 44


@dataclass(eq=False)
class Block:
    start: int
    size: int
    state: str = "free"
    freed_at: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(eq=False)
class Segment:
    small: bool
    stream: int
    page: int
    """0 for a segment of cudaMalloc."""
    blocks: list[Block] = field(default_factory=list)

    def is_whole(self) -> bool:
        return len(self.blocks) == 1 and self.blocks[0].state == "free"

    def join(self) -> None:
        """Free neighbours become one block, unmapped ones too."""
        at = 1
        while at < len(self.blocks):
            one, other = self.blocks[at - 1 : at + 1]
            if one.state == other.state != "used":
                one.size += other.size
                one.freed_at = max(one.freed_at, other.freed_at)
                del self.blocks[at]
            else:
                at += 1

    def cut(self, block: Block, offset: int) -> Block:
        """Split a block in two; the second part."""
        rest = Block(block.start + offset, block.size - offset, block.state, block.freed_at)
        block.size = offset
        self.blocks.insert(self.blocks.index(block) + 1, rest)
        return rest


class NaiveAllocator:
    """`Allocator` with segment addresses that only rise."""

    def __init__(
        self, capacity: int | None, conf: AllocConf, allowed: int | None, first_address: int = 0
    ) -> None:
        self.capacity, self.conf, self.allowed = capacity, conf, allowed
        self.segments: list[Segment] = []
        self.used: dict[int, tuple[Segment, Block]] = {}
        self.next_address = first_address
        self.searches = 0
        self.collects = allowed is not None and conf.garbage_collection_threshold > 0

    @property
    def allocated(self) -> int:
        return sum(block.size for _, block in self.used.values())

    @property
    def reserved(self) -> int:
        return sum(b.size for s in self.segments for b in s.blocks if b.state != "unmapped")

    def malloc(self, storage: int, size_bytes: int, stream: int) -> bool:
        """Whether there was memory."""
        if size_bytes == 0:
            return True
        size = -(-size_bytes // 512) * 512
        small = size <= MIB
        found = self._find(size, small, stream) or self._grow(size, small, stream)
        if found is None:
            return False
        segment, block = found
        rest = block.size - size
        if small or self.conf.expandable_segments:
            split = rest >= 512
        else:
            split = rest > MIB and size < (self.conf.max_split_size_bytes or ENDLESS)
        if split:
            segment.cut(block, size)
        block.state = "used"
        self.used[storage] = found
        return True

    def free(self, storage: int) -> None:
        if storage in self.used:
            segment, block = self.used.pop(storage)
            block.state, block.freed_at = "free", self.searches
            segment.join()

    def empty_cache(self) -> None:
        self.segments = [s for s in self.segments if s.page or not s.is_whole()]
        for segment in self.segments:
            if segment.page:
                self._unmap(segment)

    def _free_blocks(self, small: bool, stream: int) -> list[tuple[Segment, Block]]:
        return [
            (s, b)
            for s in self.segments
            for b in s.blocks
            if (s.small, s.stream, b.state) == (small, stream, "free")
        ]

    def _find(self, size: int, small: bool, stream: int) -> tuple[Segment, Block] | None:
        self.searches += not small
        candidates = [(s, b) for s, b in self._free_blocks(small, stream) if b.size >= size]
        candidates.sort(key=lambda found: (found[1].size, found[1].start))
        if not candidates:
            return None
        chosen = candidates[0]
        for following in candidates[1:]:
            if not self.conf.expandable_segments or self._room(*following) >= self._room(*chosen):
                break
            chosen = following
        limit = self.conf.max_split_size_bytes or ENDLESS
        too_large = limit if size < limit else size + self.conf.max_non_split_rounding_bytes
        return None if chosen[1].size >= too_large else chosen

    def _room(self, segment: Segment, block: Block) -> int:
        after = [b for b in segment.blocks if b.start == block.end and b.state == "unmapped"]
        return block.size + sum(b.size for b in after)

    def _grow(self, size: int, small: bool, stream: int) -> tuple[Segment, Block] | None:
        if size < 10 * MIB:
            wanted = 2 * MIB if small else self.conf.large_segment_size_bytes
        else:
            wanted = -(-size // (2 * MIB)) * 2 * MIB
        expandable = self.conf.expandable_segments
        make = self._extend if expandable else self._new_segment
        if self.collects and not expandable:
            self._collect()
        found = make(size, wanted, small, stream)
        if found is None and not expandable and self._release_oversize(size, small, stream):
            found = make(size, wanted, small, stream)
        if found is None:
            self.empty_cache()
            found = make(size, wanted, small, stream)
        return found

    def _allowed(self, size: int) -> bool:
        return self.allowed is None or self.reserved + size <= self.allowed

    def _driver_has(self, size: int) -> bool:
        return self.capacity is None or self.reserved + size <= self.capacity

    def _new_segment(self, size: int, wanted: int, small: bool, stream: int) -> tuple[Segment, Block] | None:
        if not self._allowed(wanted) or not self._driver_has(wanted):
            return None
        block = Block(self.next_address, wanted)
        self.next_address += wanted
        self.segments.append(Segment(small, stream, 0, [block]))
        return self.segments[-1], block

    def _release_oversize(self, size: int, small: bool, stream: int) -> bool:
        limit = self.conf.max_split_size_bytes
        if limit is None:
            return False
        wanted = max(size, limit)
        oversize = [found for found in self._free_blocks(small, stream) if found[1].size >= limit]
        oversize.sort(key=lambda found: (found[1].size, found[1].start))
        for segment, block in oversize:
            if block.size >= wanted:
                self.segments.remove(segment)
                return True
        released = 0
        while oversize and released < wanted:
            segment, block = oversize.pop()
            self.segments.remove(segment)
            released += block.size
        return released >= wanted

    def _collect(self) -> None:
        threshold = int(self.conf.garbage_collection_threshold * (self.allowed or 0))
        target = self.reserved - threshold
        reclaimed = 0
        while reclaimed < target:
            whole = [s for s in self.segments if not s.small and s.is_whole()]
            ages = {id(s): self.searches - s.blocks[0].freed_at for s in whole}
            old = [s for s in whole if ages[id(s)] >= sum(ages.values()) / len(whole)]
            if not old:
                return
            reclaimed += sum(s.blocks[0].size for s in old)
            self.segments = [s for s in self.segments if s not in old]

    def _extend(self, size: int, wanted: int, small: bool, stream: int) -> tuple[Segment, Block] | None:
        if not self._allowed(wanted):
            return None
        segment = next((s for s in self.segments if (s.small, s.stream) == (small, stream)), None)
        if segment is None:
            page = 2 * MIB if small else self.conf.large_segment_size_bytes
            segment = Segment(small, stream, page, [Block(0, ENDLESS // page * page, "unmapped")])
            self.segments.append(segment)
        run = self._first_run(segment, size)
        start = run[0].start
        while True:
            block = next(b for b in segment.blocks if b.start == start)
            if block.state == "free" and block.size >= size:
                return segment, block
            have = block.size if block.state == "free" else 0
            gap = next(b for b in segment.blocks if b.start == start + have)
            pages = min(-(-min(size - have, gap.size) // segment.page) * segment.page, gap.size)
            if not self._driver_has(pages):
                return None
            if pages < gap.size:
                segment.cut(gap, pages)
            gap.state = "free"
            segment.join()

    def _first_run(self, segment: Segment, size: int) -> list[Block]:
        """The lowest stretch of free and unmapped blocks that holds `size` and is not all mapped."""
        for at, block in enumerate(segment.blocks):
            if block.state != "unmapped":
                continue
            first = at - 1 if at and segment.blocks[at - 1].state == "free" else at
            run: list[Block] = []
            for other in segment.blocks[first:]:
                if other.state == "used" or sum(b.size for b in run) >= size:
                    break
                run.append(other)
            if sum(b.size for b in run) >= size:
                return run
        raise AssertionError("the last block is endless")

    def _unmap(self, segment: Segment) -> None:
        for block in [b for b in segment.blocks if b.state == "free"]:
            first = -(-block.start // segment.page) * segment.page
            last = block.end // segment.page * segment.page
            if first >= last:
                continue
            whole = segment.cut(block, first - block.start) if first > block.start else block
            if last < whole.end:
                segment.cut(whole, last - whole.start)
            whole.state = "unmapped"
        segment.join()
