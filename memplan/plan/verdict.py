"""Fits or not, and why, in one sentence.

What is known exactly is replayed; what isn't bounds it. `tight` is what lies between the bounds: the job runs
out under some of the segment addresses that a driver may choose, or if the CUDA context is as large as
planned, and runs where it is as small as has been seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.allocator import LAYOUTS, AllocConf
from memplan.estimate import Estimate, Failure, RankEstimate, Verdict
from memplan.gpus.context import context
from memplan.plan.ranks import failure_under
from memplan.request.types import CardSpec, Request
from memplan.timeline import Timeline
from memplan.units import format_bytes, gib

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class _Judged:
    verdict: Verdict
    reason: str
    failure: Failure | None = None


def judge(
    estimate: Estimate, timeline: Timeline, cards: tuple[CardSpec, ...], conf: AllocConf
) -> tuple[Verdict, str, Failure | None]:
    """The verdict for all ranks together: the first card that fails decides, else the first that is tight."""
    if not cards:
        return "unknown", "no card is named, so there is nothing to compare with", None
    judged: dict[CardSpec, _Judged] = {}
    for rank, card in zip(estimate.ranks, cards, strict=False):
        if card not in judged:
            judged[card] = _judge_card(estimate, timeline, rank, card, conf)
            if judged[card].verdict == "does not fit":
                break
    order: tuple[Verdict, ...] = ("does not fit", "unknown", "tight", "fits")
    smallest_first = sorted(judged, key=lambda card: card.total_bytes - card.used_bytes)
    worst = min((judged[card] for card in smallest_first), key=lambda one: order.index(one.verdict))
    return worst.verdict, worst.reason, worst.failure


def capacity_bytes(card: CardSpec) -> tuple[int, int]:
    """What torch may take of a card, least and most: its total less what others hold and the context."""
    left, beside = card.total_bytes - card.used_bytes, context(card)
    return left - beside.planned_bytes, left - beside.least_bytes


def _judge_card(
    estimate: Estimate, timeline: Timeline, rank: RankEstimate, card: CardSpec, conf: AllocConf
) -> _Judged:
    if rank.non_torch_bytes is None:
        return _Judged("unknown", f"what CUDA itself takes of {card.name} is not known")
    least, most = capacity_bytes(card)
    if rank.reserved_range_bytes[1] <= least and conf.per_process_memory_fraction == 1:
        return _Judged("fits", _takes(rank, card))

    def fails(capacity: int, layout: int = 0) -> Failure | None:
        return failure_under(
            timeline, rank=rank.rank, card=card, capacity_bytes=capacity, conf=conf, layout=LAYOUTS[layout]
        )

    surely = fails(most)
    if surely is not None:
        # With the planned context, whose figures stand beside it in the report.
        failure = (fails(least) if least != most else surely) or surely
        return _Judged("does not fit", _why_not(estimate, card, failure), failure)
    planned = fails(least)
    if planned is not None:
        return _Judged("tight", _depends_on_context(planned, least, most))
    if any(fails(least, layout) for layout in range(1, len(LAYOUTS))):
        return _Judged("tight", _depends_on_addresses(rank, least))
    if rank.peak_reserved_bytes <= least:
        return _Judged("fits", _takes(rank, card))
    return _Judged("fits", _gives_back(rank, least))


def _takes(rank: RankEstimate, card: CardSpec) -> str:
    beside = rank.non_torch_bytes or 0
    parts = f"{gib(rank.peak_reserved_bytes):.2f} GiB reserved + {gib(beside):.2f} GiB CUDA context"
    if card.used_bytes:
        parts += f" + {gib(card.used_bytes):.2f} GiB of other processes"
    needed = rank.peak_reserved_bytes + beside + card.used_bytes
    return f"takes {parts} = {gib(needed):.2f} GiB of {gib(card.total_bytes):.2f} GiB"


def _gives_back(rank: RankEstimate, capacity: int) -> str:
    return (
        f"runs in the {gib(capacity):.2f} GiB that torch may take, where it would reserve"
        f" {gib(rank.peak_reserved_bytes):.2f} GiB: torch gives cached memory back when the card is full"
    )


def _depends_on_context(failure: Failure, least: int, most: int) -> str:
    return (
        f"it depends on the CUDA context, which was not measured on this card: it runs out"
        f" {_where(failure)} if torch may take {gib(least):.2f} GiB, and runs in {gib(most):.2f} GiB"
    )


def _depends_on_addresses(rank: RankEstimate, capacity: int) -> str:
    low, high = rank.reserved_range_bytes
    span = f"{gib(low):.2f}" if gib(high) - gib(low) < 0.01 else f"{gib(low):.2f}–{gib(high):.2f}"
    return (
        f"runs in the {gib(capacity):.2f} GiB that torch may take, where it would reserve {span} GiB, but"
        " only with memory laid out as was measured: another driver's addresses may fragment it too much"
    )


def _why_not(estimate: Estimate, card: CardSpec, failure: Failure) -> str:
    total = f"{gib(card.total_bytes):.2f} GiB"
    processes = estimate.request.num_processes or 1
    held = f", of which other processes hold {gib(card.used_bytes):.2f} GiB" if card.used_bytes else ""
    if failure.phase == "load":
        weights = f"{gib(weight_bytes(estimate)):.1f} GiB of {_weights(estimate.request)} weights"
        if processes == 1:
            return f"it fails while loading: {weights} do not go onto a {total} card{held}"
        return (
            f"it fails while loading: each of the {processes} processes puts {weights} on its own {total}"
            f" card{held} (data parallelism replicates the model, the cards do not add up)"
        )
    asked = (
        f"{format_bytes(failure.requested_bytes)} more were asked for with {gib(failure.allocated_bytes):.2f}"
        f" of {gib(failure.capacity_bytes):.2f} GiB allocated"
    )
    if failure.kind == "fragmentation":
        asked += f", enough in all but in pieces: {gib(failure.unused_bytes):.2f} GiB are reserved and unused"
    return f"it fails {_where(failure)} on a {total} card{held}: {asked}"


def _where(failure: Failure) -> str:
    where = {"load": "while loading", "prepare": "while preparing", "optimizer": "in the optimizer step"}.get(
        failure.phase, f"in the {failure.phase} pass"
    )
    return f"{where} of step {failure.step + 1}" if failure.step >= 0 else where


def weight_bytes(estimate: Estimate) -> int:
    """The bytes of the base model's parameters on one card."""
    return int(estimate.facts.get("weight_bytes", 0))


def _weights(request: Request) -> str:
    if request.load_in_4bit:
        return "4-bit"
    if request.load_in_8bit:
        return "8-bit"
    return _DTYPES.get(str(request.dtype), str(request.dtype))
