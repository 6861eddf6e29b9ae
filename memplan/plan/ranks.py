"""A timeline on a card: the replay, split by phase and by what the memory is for."""

from __future__ import annotations

from array import array
from dataclasses import asdict, replace
from typing import Any

from memplan.allocator import LAYOUTS, AllocConf, Layout, Replay, live_at, replay
from memplan.estimate import Failure, PhaseUse, RankEstimate
from memplan.gpus.context import non_torch_bytes
from memplan.plan.memo import recalled
from memplan.request.types import CardSpec
from memplan.timeline import Category, Timeline
from memplan.units import GIB

WARMUP = "caching_allocator_warmup"
WARMUP_RESERVE_BYTES = int(1.2 * GIB)
"""transformers' warm-up block leaves this much of the card alone (modeling_utils.py, 5.17.0)."""

# Phases as a person knows them; the others keep their names.
_SHOWN_AS = {"clip": "optimizer", "zero_grad": "optimizer", "data": "forward"}


def on_card(timeline: Timeline, total_bytes: int | None) -> Timeline:
    """The timeline with the loader's warm-up block bounded as on a card of this size."""
    if total_bytes is None or WARMUP not in timeline.operators:
        return timeline
    most = max(total_bytes - WARMUP_RESERVE_BYTES, 0) // 2 * 2
    operator = timeline.operators.index(WARMUP)
    sizes = array("q", timeline.size_bytes)
    changed = False
    storages = {timeline.storage[i] for i, o in enumerate(timeline.operator) if o == operator}
    for index, storage in enumerate(timeline.storage):
        if storage in storages and sizes[index] > most:
            sizes[index], changed = most, True
        elif changed and storage not in storages:
            break
    return replace(timeline, size_bytes=sizes) if changed else timeline


def estimate_rank(
    timeline: Timeline,
    *,
    rank: int,
    card: CardSpec | None,
    conf: AllocConf,
    layouts: tuple[Layout, ...] = LAYOUTS,
) -> RankEstimate:
    """What one process holds, on a card that is large enough."""
    question = f"rank {card!r} {conf!r} {layouts!r}"
    found = recalled(
        timeline, question, lambda: asdict(_estimate_rank(timeline, card=card, conf=conf, layouts=layouts))
    )
    return _rank_of({**found, "rank": rank})


def _rank_of(found: dict[str, Any]) -> RankEstimate:
    uses = {name: PhaseUse(**use) for name, use in found["phases"].items()}
    least, most = found["reserved_range_bytes"]
    return RankEstimate(
        **{
            **found,
            "phases": uses,
            "train": PhaseUse(**found["train"]),
            "reserved_range_bytes": (least, most),
        }
    )


def _estimate_rank(
    timeline: Timeline, *, card: CardSpec | None, conf: AllocConf, layouts: tuple[Layout, ...]
) -> RankEstimate:
    placed = on_card(timeline, card.total_bytes if card else None)
    replays = [replay(placed, conf=conf, layout=layout) for layout in layouts]
    best = replays[0]
    reserved = [r.peak_reserved_bytes for r in replays]
    non_torch = non_torch_bytes(card)[0] if card else None
    event = best.peak_event
    phase = placed.phases[placed.phase[event]]
    return RankEstimate(
        rank=0,
        device=card.name if card else "unknown",
        total_bytes=card.total_bytes if card else None,
        peak_allocated_bytes=best.peak_allocated_bytes,
        peak_reserved_bytes=best.peak_reserved_bytes,
        reserved_range_bytes=(min(reserved), max(reserved)),
        non_torch_bytes=non_torch,
        phases=phase_uses(placed, best),
        train=_over(best, [i for i, p in enumerate(placed.phases) if p.step >= 0]),
        breakdown_bytes=_breakdown(placed, best, non_torch),
        peak_operator=placed.operators[placed.operator[event]],
        peak_module=placed.modules[placed.module[event]],
        peak_phase=_SHOWN_AS.get(phase.name, phase.name),
        peak_step=phase.step,
    )


def phase_uses(timeline: Timeline, replayed: Replay) -> dict[str, PhaseUse]:
    """Phase → its peaks over all steps, in the order in which phases are first entered."""
    indices: dict[str, list[int]] = {}
    for index, phase in enumerate(timeline.phases):
        indices.setdefault(_SHOWN_AS.get(phase.name, phase.name), []).append(index)
    return {name: _over(replayed, found) for name, found in indices.items()}


def failure_under(
    timeline: Timeline,
    *,
    rank: int,
    card: CardSpec,
    capacity_bytes: int,
    conf: AllocConf,
    layout: Layout = LAYOUTS[0],
) -> Failure | None:
    """Where the job runs out when torch may take `capacity_bytes` of the card; None where it doesn't."""

    def replayed() -> dict[str, Any] | None:
        failure = _failure_under(
            timeline, rank=rank, card=card, capacity_bytes=capacity_bytes, conf=conf, layout=layout
        )
        return None if failure is None else asdict(failure)

    found = recalled(timeline, f"failure {card!r} {capacity_bytes} {conf!r} {layout!r}", replayed)
    return None if found is None else Failure(**{**found, "rank": rank})


def _failure_under(
    timeline: Timeline, *, rank: int, card: CardSpec, capacity_bytes: int, conf: AllocConf, layout: Layout
) -> Failure | None:
    placed = on_card(timeline, card.total_bytes)
    fraction = conf.per_process_memory_fraction
    failed = replay(
        placed,
        capacity_bytes=max(capacity_bytes, 0),
        allowed_bytes=int(fraction * card.total_bytes) if fraction < 1 else None,
        conf=conf,
        layout=layout,
    ).failure
    if failed is None:
        return None
    event = failed.event
    phase = placed.phases[placed.phase[event]]
    return Failure(
        rank=rank,
        phase=_SHOWN_AS.get(phase.name, phase.name),
        step=phase.step,
        operator=placed.operators[placed.operator[event]],
        module=placed.modules[placed.module[event]],
        requested_bytes=failed.requested_bytes,
        allocated_bytes=failed.allocated_bytes,
        reserved_bytes=failed.reserved_bytes,
        capacity_bytes=min(capacity_bytes, failed.limit_bytes),
        total_bytes=card.total_bytes,
    )


def _over(replayed: Replay, phases: list[int]) -> PhaseUse:
    peaks = [replayed.phase_peaks[i] for i in phases]
    return PhaseUse(
        allocated_bytes=max((p[0] for p in peaks), default=0),
        reserved_bytes=max((p[1] for p in peaks), default=0),
    )


def _breakdown(timeline: Timeline, replayed: Replay, non_torch: int | None) -> dict[str, int]:
    parts = {category.name.lower(): 0 for category in Category}
    for storage, block_bytes in live_at(timeline, replayed, replayed.peak_event).items():
        parts[Category(timeline.category[storage]).name.lower()] += block_bytes
    parts["allocator_cache"] = replayed.peak_reserved_bytes - replayed.peak_allocated_bytes
    if non_torch is not None:
        parts["cuda_context"] = non_torch
    return parts
