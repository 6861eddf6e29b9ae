"""A timeline through the allocator: its peaks, where they are, and what is alive there."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from memplan.allocator.blocks import GRAIN
from memplan.allocator.caching import Allocator, OutOfMemory
from memplan.allocator.conf import AllocConf
from memplan.allocator.layout import LAYOUTS, Layout
from memplan.timeline import Kind, Timeline


@dataclass(frozen=True)
class ReplayFailure:
    """The event that ran out of memory, with the figures of `OutOfMemory`."""

    event: int
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    limit_bytes: int


@dataclass(frozen=True)
class Replay:
    """What the allocator held over a timeline; up to the failing event where there is a `failure`."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    phase_peaks: tuple[tuple[int, int], ...]
    """By `Timeline.phases`: the most allocated and reserved in it, what it began with included."""
    peak_event: int
    """The first event at the peak allocated; -1 where nothing was allocated."""
    peak_reserved_event: int
    block_bytes: array[int]
    """By storage: the size of its block; 0 where it has none."""
    failure: ReplayFailure | None
    end_allocated_bytes: int
    end_reserved_bytes: int


def replay(
    timeline: Timeline,
    *,
    capacity_bytes: int | None = None,
    conf: AllocConf | None = None,
    layout: Layout = LAYOUTS[0],
    allowed_bytes: int | None = None,
) -> Replay:
    """Run every event through an empty `Allocator`, whose limits and settings the arguments are.

    Raises `KeyError` for a timeline that frees what is not allocated.
    """
    allocator = Allocator(capacity_bytes, conf, layout, allowed_bytes=allowed_bytes)
    block_bytes = array("q", bytes(8 * _storages(timeline)))
    phase_peaks = [(0, 0)] * len(timeline.phases)
    peak = peak_reserved = _Peak(0, -1)
    failure = None
    for phase, start, stop in _runs(timeline.phase):
        top, top_reserved, failure = _run(allocator, timeline, start, stop, block_bytes)
        before = phase_peaks[phase]
        phase_peaks[phase] = max(before[0], top.size_bytes), max(before[1], top_reserved.size_bytes)
        # Equal peaks: the first one counts.
        peak = max(peak, top, key=_size)
        peak_reserved = max(peak_reserved, top_reserved, key=_size)
        if failure:
            break
    return Replay(
        peak_allocated_bytes=peak.size_bytes,
        peak_reserved_bytes=peak_reserved.size_bytes,
        phase_peaks=tuple(phase_peaks),
        peak_event=peak.event,
        peak_reserved_event=peak_reserved.event,
        block_bytes=block_bytes,
        failure=failure,
        end_allocated_bytes=allocator.allocated_bytes,
        end_reserved_bytes=allocator.reserved_bytes,
    )


def live_at(timeline: Timeline, replayed: Replay, event: int) -> dict[int, int]:
    """Storage → bytes of its block, for all that is alive right after `event`."""
    live: dict[int, int] = {}
    columns = zip(timeline.kind[: event + 1], timeline.storage[: event + 1], strict=True)
    for kind, storage in columns:
        if kind == Kind.ALLOC:
            live[storage] = replayed.block_bytes[storage]
        elif kind == Kind.FREE:
            del live[storage]
    return {storage: size_bytes for storage, size_bytes in live.items() if size_bytes}


class _Peak(NamedTuple):
    size_bytes: int
    event: int


def _size(peak: _Peak) -> int:
    return peak.size_bytes


def _run(
    allocator: Allocator, timeline: Timeline, start: int, stop: int, block_bytes: array[int]
) -> tuple[_Peak, _Peak, ReplayFailure | None]:
    """Events `start` to `stop`: the most allocated and reserved, the state before them included.

    The only loop over events, so everything in it is local.
    """
    malloc, free, blocks = allocator.malloc, allocator.free, allocator.blocks
    is_alloc, is_free = int(Kind.ALLOC), int(Kind.FREE)
    top, top_event = allocator.allocated, -1
    top_reserved, top_reserved_event = blocks.reserved, -1
    failure = None
    event = start
    columns = timeline.kind, timeline.storage, timeline.size_bytes, timeline.stream
    rows = zip(range(start, stop), *(column[start:stop] for column in columns), strict=True)
    try:
        for event, kind, storage, size_bytes, stream in rows:
            if kind == is_alloc:
                block_bytes[storage] = malloc(storage, size_bytes, stream)
                if allocator.allocated > top:
                    top, top_event = allocator.allocated, event
                if blocks.reserved > top_reserved:
                    top_reserved, top_reserved_event = blocks.reserved, event
            elif kind == is_free:
                free(storage)
            else:
                allocator.empty_cache()
    except OutOfMemory as error:
        failure = ReplayFailure(
            event, error.requested_bytes, error.allocated_bytes, error.reserved_bytes, error.limit_bytes
        )
    return _Peak(top << GRAIN, top_event), _Peak(top_reserved << GRAIN, top_reserved_event), failure


def _runs(phases: array[int]) -> Iterator[tuple[int, int, int]]:
    """(phase, start, stop) of each unbroken run of events of one phase."""
    start = 0
    for phase, run in groupby(phases):
        stop = start + sum(1 for _ in run)
        yield phase, start, stop
        start = stop


def _storages(timeline: Timeline) -> int:
    return max(max(timeline.storage, default=-1) + 1, len(timeline.category))
