"""The OOM boundary: the least memory that torch must be allowed for a job to run through.

It lies between the peak of what is allocated, which fragmentation keeps out of reach, and the peak of what is
reserved, since torch gives cached memory back before it fails.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.allocator import LAYOUTS, AllocConf, Layout, replay
from memplan.timeline import Timeline
from memplan.units import MIB

GRAIN_BYTES = 2 * MIB
"""Segments are multiples of it (`kRoundLarge`, c10/core/AllocatorConfig.h), so limits between two of them
decide alike, but for `garbage_collection_threshold`, which is a share of the limit."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The least limit under which a job passes, in bytes, and its range over the segment address layouts."""

    passes_at_bytes: int
    range_bytes: tuple[int, int]


def boundary_of(timeline: Timeline, conf: AllocConf | None = None) -> Boundary:
    """The boundary of a timeline, with its range: a bisection for each layout."""
    found = [boundary_bytes(timeline, conf, layout=layout) for layout in LAYOUTS]
    return Boundary(passes_at_bytes=found[0], range_bytes=(min(found), max(found)))


def boundary_bytes(timeline: Timeline, conf: AllocConf | None = None, *, layout: Layout = LAYOUTS[0]) -> int:
    """The least `set_per_process_memory_fraction`, in bytes of the card, under which every event succeeds.

    Exact to 2 MiB. Found by bisection, as one would find it on a card: where a larger limit fails again,
    which fragmentation can bring about, it is one of the places at which failing turns into passing.
    """
    fails, passes = -1, -(-_peak_reserved_bytes(timeline, conf, layout) // GRAIN_BYTES)
    while passes - fails > 1:
        middle = (fails + passes) // 2
        if passes_under(timeline, middle * GRAIN_BYTES, conf, layout):
            passes = middle
        else:
            fails = middle
    return passes * GRAIN_BYTES


def passes_under(
    timeline: Timeline, allowed_bytes: int, conf: AllocConf | None = None, layout: Layout = LAYOUTS[0]
) -> bool:
    """Whether every event succeeds when torch allows itself `allowed_bytes`."""
    return replay(timeline, conf=conf, layout=layout, allowed_bytes=allowed_bytes).failure is None


def _peak_reserved_bytes(timeline: Timeline, conf: AllocConf | None, layout: Layout) -> int:
    """Under this limit nothing is ever refused."""
    return replay(timeline, conf=conf, layout=layout).peak_reserved_bytes
