"""The allocator against recorded histories, measured rows, and a plain model of the same rules."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_allocator import NaiveAllocator

from memplan.allocator import LAYOUTS, Allocator, AllocConf, Layout, OutOfMemory, live_at, replay
from memplan.timeline import Kind, Phase, Timeline
from memplan.units import GIB, MIB

MEASURED = Path(__file__).parent / "measured"
QWEN = "qwen2.5-0.5b_full_bf16_b2_s1024_snapshot-True_solo-True"
LLAMA = "llama-2-7b_qlora_nf4_b1_s1024_snapshot-True_solo-True_gc"
RISING = next(layout for layout in LAYOUTS if layout.order == "rising")


def history(name: str) -> list[tuple[str, int, int]]:
    """(action, address, bytes) of every allocator event of a run on an H100, in order."""
    with gzip.open(MEASURED / "events" / f"{name}.events.json.gz", "rt") as file:
        (events,) = json.load(file)
    return [(action, address, size) for action, address, size in events]


def row(file: str, case: str) -> dict[str, object]:
    rows = [json.loads(line) for line in (MEASURED / file).read_text().splitlines()]
    return next(row for row in rows if row["id"] == case)


def timeline_of(events: list[tuple[str, int, int]]) -> Timeline:
    """The history as a timeline: an emptied cache where segments were freed, and one phase."""
    timeline = Timeline(phases=[Phase("forward", 0)])
    live: dict[int, int] = {}
    before = ""
    for action, address, size in events:
        if action == "alloc":
            live[address] = len(timeline.category)
            timeline.category.append(0)
            add(timeline, Kind.ALLOC, live[address], size)
        elif action == "free_completed":
            add(timeline, Kind.FREE, live.pop(address))
        elif action == "segment_free" and before != action:
            add(timeline, Kind.EMPTY_CACHE)
        before = action
    return timeline


def add(timeline: Timeline, kind: Kind, storage: int = 0, size: int = 0, phase: int = 0) -> None:
    timeline.kind.append(kind)
    timeline.storage.append(storage)
    timeline.size_bytes.append(size)
    timeline.phase.append(phase)
    timeline.operator.append(0)
    timeline.module.append(0)
    timeline.stream.append(0)


@dataclass(frozen=True)
class Recorded(Layout):
    """Hands out the addresses that the driver gave in a history."""

    segments: tuple[tuple[int, int], ...] = ()

    def open(self) -> RecordedAddresses:  # type: ignore[override]
        return RecordedAddresses(iter(self.segments))


@dataclass
class RecordedAddresses:
    segments: Iterator[tuple[int, int]]

    def take(self, size_bytes: int) -> int:
        address, recorded_bytes = next(self.segments)
        assert recorded_bytes == size_bytes
        return address

    def give_back(self, start: int, size_bytes: int) -> None:
        pass


def follow(events: list[tuple[str, int, int]], allocator: Allocator) -> Iterator[tuple[int, int, int, int]]:
    """After each allocation: its address and ours, the bytes reserved and ours."""
    reserved = 0
    before = ""
    live: dict[int, int] = {}
    for storage, (action, address, size) in enumerate(events):
        if action == "segment_alloc":
            reserved += size
        elif action == "segment_free":
            reserved -= size
            if before != action:
                allocator.empty_cache()
        elif action == "alloc":
            live[address] = storage
            allocator.malloc(storage, size)
            yield address, allocator.address(storage), reserved, allocator.reserved_bytes
        elif action == "free_completed":
            allocator.free(live.pop(address))
        before = action


@pytest.mark.parametrize("name", [QWEN, LLAMA])
def test_with_the_segments_of_a_history_every_block_lies_where_torch_put_it(name: str) -> None:
    events = history(name)
    segments = tuple((address, size) for action, address, size in events if action == "segment_alloc")
    allocations = 0
    allocator = Allocator(layout=Recorded(segments=segments))
    for address, ours, reserved, our_reserved in follow(events, allocator):
        assert (ours, our_reserved) == (address, reserved)
        allocations += 1
    assert allocations > 10_000


@pytest.mark.parametrize("name", [QWEN, LLAMA])
def test_the_default_layout_reserves_as_measured_at_every_point(name: str) -> None:
    for _, _, reserved, ours in follow(history(name), Allocator()):
        assert ours == reserved


@pytest.mark.parametrize("name", [QWEN, LLAMA])
def test_no_layout_is_far_off_the_measured_peak(name: str) -> None:
    timeline = timeline_of(history(name))
    measured = row("steps.jsonl", name)["peak_reserved"]
    peaks = [replay(timeline, layout=layout).peak_reserved_bytes for layout in LAYOUTS]
    assert peaks[0] == measured
    assert peaks == pytest.approx([measured] * len(LAYOUTS), rel=0.001)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (QWEN, "qwen2.5-0.5b_full_bf16_b2_s1024_alloc_conf-expandable_segments:True"),
        (LLAMA, "llama-2-7b_qlora_nf4_b1_s1024_alloc_conf-expandable_segments:True_gc"),
    ],
)
def test_expandable_segments_peak_as_measured_in_the_same_run_with_them(name: str, case: str) -> None:
    measured = row("steps.jsonl", case)
    conf = AllocConf.parse(str(measured["alloc_conf"]))
    replayed = replay(timeline_of(history(name)), conf=conf)
    assert replayed.peak_allocated_bytes == measured["peak_allocated"]
    assert replayed.peak_reserved_bytes == measured["peak_reserved"]


def test_the_measured_cap_is_where_the_replay_begins_to_fit() -> None:
    measured = row("boundary.jsonl", "qwen2.5-0.5b_full_bf16_b2_s1024_grad_ckpt-False")
    timeline = timeline_of(history(QWEN))
    for mib, outcome, allocated, reserved, message in measured["trials"]:  # type: ignore[attr-defined]
        replayed = replay(timeline, allowed_bytes=int(mib * MIB))
        if outcome == "ok":
            assert replayed.failure is None
            assert (replayed.peak_allocated_bytes, replayed.peak_reserved_bytes) == (allocated, reserved)
        else:
            assert replayed.failure is not None
            assert f"Tried to allocate {replayed.failure.requested_bytes / GIB:.2f} GiB" in message


SIZES = st.one_of(
    st.integers(0, 4096),
    st.integers(1, 3 * MIB),
    st.integers(MIB, 24 * MIB),
    st.integers(10 * MIB, 90 * MIB),
    st.sampled_from([512, 513, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB, 20 * MIB, 40 * MIB]),
)
CONFS = [
    AllocConf(),
    AllocConf(max_split_size_bytes=24 * MIB),
    AllocConf(garbage_collection_threshold=0.4),
    AllocConf(max_split_size_bytes=32 * MIB, garbage_collection_threshold=0.6),
    AllocConf(large_segment_size_bytes=11 * MIB),
    AllocConf(expandable_segments=True),
    AllocConf(expandable_segments=True, large_segment_size_bytes=32 * MIB),
    AllocConf(expandable_segments=True, max_split_size_bytes=24 * MIB),
]
CAPS = st.one_of(st.none(), st.integers(1, 400 * MIB))
Step = tuple[int, int] | int | None
"""An allocation of bytes on a stream, or a number that says which live storage to free, or an empty_cache."""
STEPS = st.lists(
    st.one_of(
        st.tuples(SIZES, st.sampled_from([0, 0, 0, 1])),
        st.integers(0, 1000),
        st.integers(0, 1000),
        st.none(),
    ),
    max_size=120,
)


@settings(max_examples=400, deadline=None)
@given(STEPS, st.sampled_from(CONFS), CAPS, CAPS)
def test_it_agrees_with_a_plain_model_of_the_rules(
    steps: list[Step], conf: AllocConf, capacity: int | None, allowed: int | None
) -> None:
    compare(steps, conf, capacity, allowed)


@pytest.mark.parametrize("seed", range(32))
def test_it_agrees_with_the_plain_model_over_a_long_walk(seed: int) -> None:
    """A few sizes that come back, as in training, so that blocks are reused and gaps appear."""
    rng = random.Random(seed)
    kinds = [rng.randrange(1, MIB), rng.randrange(MIB, 24 * MIB), rng.randrange(10 * MIB, 90 * MIB)] * 4
    sizes = [rng.choice(kinds) * rng.randrange(60, 100) // 100 for _ in range(12)]
    steps: list[Step] = [
        rng.choice([(rng.choice(sizes), rng.choice([0, 0, 0, 1])), rng.randrange(1000)])
        if rng.random() < 0.98
        else None
        for _ in range(700)
    ]
    capacity, allowed = rng.choice([None, 400 * MIB, 900 * MIB]), rng.choice([None, 350 * MIB, 800 * MIB])
    compare(steps, CONFS[seed % len(CONFS)], capacity, allowed)


def compare(steps: list[Step], conf: AllocConf, capacity: int | None, allowed: int | None) -> None:
    """Take the steps with both; they must fit and hold the same after each."""
    allocator = Allocator(capacity, conf, RISING, allowed_bytes=allowed)
    naive = NaiveAllocator(capacity, conf, allowed)
    live: list[int] = []
    for storage, step in enumerate(steps):
        if isinstance(step, tuple):
            if naive.malloc(storage, *step):
                allocator.malloc(storage, *step)
                live.append(storage)
            else:
                with pytest.raises(OutOfMemory):
                    allocator.malloc(storage, *step)
        elif step is None:
            allocator.empty_cache()
            naive.empty_cache()
        elif live:
            chosen = live.pop(step % len(live))
            allocator.free(chosen)
            naive.free(chosen)
        assert (allocator.allocated_bytes, allocator.reserved_bytes) == (naive.allocated, naive.reserved)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.sampled_from(CONFS), CAPS, st.sampled_from(LAYOUTS))
def test_blocks_never_overlap_and_everything_can_be_given_back(
    steps: list[Step], conf: AllocConf, capacity: int | None, layout: Layout
) -> None:
    allocator = Allocator(capacity, conf, layout)
    live: dict[int, int] = {}
    for storage, step in enumerate(steps):
        if isinstance(step, tuple):
            try:
                block_bytes = allocator.malloc(storage, *step)
            except OutOfMemory:
                continue
            assert block_bytes >= step[0]
            live[storage] = block_bytes
        elif step is None:
            allocator.empty_cache()
        elif live:
            chosen = list(live)[step % len(live)]
            del live[chosen]
            allocator.free(chosen)
        spans = sorted((allocator.address(s), size) for s, size in live.items() if size)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(spans))
        assert allocator.allocated_bytes == sum(live.values()) <= allocator.reserved_bytes
        assert capacity is None or allocator.reserved_bytes <= capacity
    for storage in live:
        allocator.free(storage)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


def test_blocks_of_one_stream_do_not_serve_another() -> None:
    allocator = Allocator()
    allocator.malloc(1, 30 * MIB, stream=0)
    allocator.free(1)
    allocator.malloc(2, 30 * MIB, stream=7)
    assert allocator.reserved_bytes == 60 * MIB


def test_a_small_rest_of_a_large_block_counts_as_allocated() -> None:
    allocator = Allocator()
    allocator.malloc(1, 20 * MIB)
    allocator.free(1)
    assert allocator.malloc(2, 19 * MIB) == 20 * MIB
    assert allocator.allocated_bytes == 20 * MIB


def test_under_a_cap_the_cache_is_given_back_before_it_fails() -> None:
    allocator = Allocator(capacity_bytes=100 * MIB)
    allocator.malloc(1, 60 * MIB)
    allocator.free(1)
    allocator.malloc(2, 80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(3, 21 * MIB)
    assert caught.value.requested_bytes == 22 * MIB
    assert caught.value.allocated_bytes == caught.value.reserved_bytes == 80 * MIB
    assert caught.value.limit_bytes == 100 * MIB


def test_a_gap_in_an_expandable_segment_is_filled_before_it_grows() -> None:
    allocator = Allocator(conf=AllocConf(expandable_segments=True))
    allocator.malloc(1, 40 * MIB)
    allocator.malloc(2, 40 * MIB)
    allocator.free(1)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MIB
    allocator.malloc(3, 30 * MIB)
    assert allocator.address(3) < allocator.address(2)
    assert allocator.reserved_bytes == 80 * MIB


def two_phases() -> Timeline:
    """forward holds 2 MiB and peaks at 62 MiB, backward peaks at 42, then forward again at 32."""
    timeline = Timeline(phases=[Phase("forward", 0), Phase("backward", 0), Phase("clip", 0)])
    add(timeline, Kind.ALLOC, 0, 2 * MIB, phase=0)
    add(timeline, Kind.ALLOC, 1, 60 * MIB, phase=0)
    add(timeline, Kind.FREE, 1, phase=0)
    add(timeline, Kind.ALLOC, 2, 40 * MIB, phase=1)
    add(timeline, Kind.FREE, 2, phase=1)
    add(timeline, Kind.ALLOC, 3, 0, phase=1)
    add(timeline, Kind.ALLOC, 4, 30 * MIB, phase=0)
    return timeline


def test_a_replay_tells_the_peaks_of_each_phase_and_where_the_highest_is() -> None:
    timeline = two_phases()
    replayed = replay(timeline)
    assert replayed.phase_peaks == ((62 * MIB, 80 * MIB), (42 * MIB, 80 * MIB), (0, 0))
    assert (replayed.peak_allocated_bytes, replayed.peak_event) == (62 * MIB, 1)
    assert (replayed.peak_reserved_bytes, replayed.peak_reserved_event) == (80 * MIB, 1)
    assert (replayed.end_allocated_bytes, replayed.end_reserved_bytes) == (32 * MIB, 80 * MIB)
    assert list(replayed.block_bytes) == [2 * MIB, 60 * MIB, 40 * MIB, 0, 30 * MIB]
    assert live_at(timeline, replayed, replayed.peak_event) == {0: 2 * MIB, 1: 60 * MIB}
    assert live_at(timeline, replayed, 6) == {0: 2 * MIB, 4: 30 * MIB}


def test_what_is_alive_at_the_peak_adds_up_to_it() -> None:
    timeline = timeline_of(history(QWEN))
    replayed = replay(timeline)
    assert sum(live_at(timeline, replayed, replayed.peak_event).values()) == replayed.peak_allocated_bytes


def test_a_replay_stops_at_the_event_that_runs_out() -> None:
    replayed = replay(two_phases(), capacity_bytes=70 * MIB)
    assert replayed.failure is not None
    assert replayed.failure.event == 1
    assert replayed.failure.requested_bytes == 60 * MIB
    assert replayed.failure.reserved_bytes == replayed.end_reserved_bytes == 20 * MIB
    assert replayed.phase_peaks == ((2 * MIB, 20 * MIB), (0, 0), (0, 0))


def test_an_empty_timeline_holds_nothing() -> None:
    replayed = replay(Timeline())
    assert (replayed.peak_allocated_bytes, replayed.peak_event, replayed.failure) == (0, -1, None)


def test_addresses_come_as_the_driver_gave_them() -> None:
    """Offsets as in the Qwen history, where the driver took nothing for itself in between."""
    space = LAYOUTS[0].open()
    top = space.take(20 * MIB)
    freed = space.take(260 * MIB)
    assert freed - top == -288 * MIB
    space.give_back(freed, 260 * MIB)
    latest = space.take(20 * MIB)
    assert latest - top == -32 * MIB
    tails = [space.take(2 * MIB) for _ in range(7)]
    assert [tail - latest for tail in tails[:6]] == [(20 + 2 * i) * MIB for i in range(6)]
    assert tails[6] - top == 20 * MIB
