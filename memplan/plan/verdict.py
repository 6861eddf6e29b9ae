"""Fits or not, and why, in one sentence."""

from __future__ import annotations

from memplan.allocator import AllocConf
from memplan.estimate import Estimate, Failure, RankEstimate, Verdict
from memplan.request.types import CardSpec, Request
from memplan.timeline import Timeline
from memplan.units import format_bytes, gib
from memplan.plan.ranks import failure_under


def judge(
    estimate: Estimate, timeline: Timeline, cards: tuple[CardSpec, ...], conf: AllocConf
) -> tuple[Verdict, str, Failure | None]:
    """The verdict for all ranks together: the first card that fails decides."""
    if not cards:
        return "unknown", "no card is named, so there is nothing to compare with", None
    verdict: Verdict = "fits"
    tightest: RankEstimate | None = None
    checked: dict[CardSpec, Failure | None] = {}
    for rank, card in zip(estimate.ranks, cards, strict=False):
        capacity = capacity_bytes(rank, card)
        if capacity is None:
            return "unknown", f"what CUDA itself takes of {card.name} is not known", None
        if rank.reserved_range_bytes[1] > capacity:
            if card not in checked:
                checked[card] = failure_under(
                    timeline, rank=rank.rank, card=card, capacity_bytes=capacity, conf=conf
                )
            failure = checked[card]
            if failure is not None:
                return "does not fit", _why_not(estimate, rank, card, failure), failure
            verdict = "tight"
        if tightest is None or (rank.total_bytes or 0) < (tightest.total_bytes or 0):
            tightest = rank
    assert tightest is not None
    return verdict, _why(tightest, verdict), None


def capacity_bytes(rank: RankEstimate, card: CardSpec) -> int | None:
    """What torch may take of a card: its total less the CUDA context and what others hold."""
    if rank.non_torch_bytes is None:
        return None
    return card.total_bytes - rank.non_torch_bytes - card.used_bytes


def _why(rank: RankEstimate, verdict: Verdict) -> str:
    needed, total = rank.needed_bytes or 0, rank.total_bytes or 0
    figures = (
        f"{gib(rank.peak_reserved_bytes):.2f} GiB reserved + {gib(rank.non_torch_bytes or 0):.2f} GiB"
        f" CUDA context = {gib(needed):.2f} GiB"
    )
    if verdict == "tight":
        return (
            f"would take {figures} of {gib(total):.2f} GiB; it runs only because torch gives cached memory"
            " back when the card is full"
        )
    return f"takes {figures} of {gib(total):.2f} GiB"


def _why_not(estimate: Estimate, rank: RankEstimate, card: CardSpec, failure: Failure) -> str:
    request, total = estimate.request, f"{gib(card.total_bytes):.2f} GiB"
    processes = request.num_processes or 1
    asked = (
        f"{format_bytes(failure.requested_bytes)} more were asked for with {gib(failure.allocated_bytes):.2f}"
        f" of {gib(failure.capacity_bytes):.2f} GiB allocated"
    )
    if failure.phase == "load":
        weights = f"{gib(weight_bytes(estimate)):.1f} GiB of {_weights(request)} weights"
        if processes == 1:
            return f"it fails while loading: {weights} do not go onto a {total} card"
        return (
            f"it fails while loading: each of the {processes} processes puts {weights} on its own {total} card"
            " (data parallelism replicates the model, the cards do not add up)"
        )
    where = {"prepare": "while preparing", "optimizer": "in the optimizer step"}.get(
        failure.phase, f"in the {failure.phase} pass"
    )
    step = f" of step {failure.step + 1}" if failure.step >= 0 else ""
    return f"it fails {where}{step} on a {total} card: {asked}"


def weight_bytes(estimate: Estimate) -> int:
    """The bytes of the base model's parameters on one card."""
    return int(estimate.facts.get("weight_bytes", 0))


def _weights(request: Request) -> str:
    if request.load_in_4bit:
        return "4-bit"
    if request.load_in_8bit:
        return "8-bit"
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(request.dtype), str(request.dtype))
