"""The run planned again beside what its text says: do they agree, and what would fit?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from memplan.diagnosis.types import Comparison, Diagnosis, Event, Figures, Phase, Replan
from memplan.request.types import CardSpec, Request
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.estimate import Plan

AGREES_WITHIN = 0.1
_PHASES: dict[str, Phase] = {
    "load": "load",
    "prepare": "load",
    "data": "data",
    "forward": "forward",
    "backward": "backward",
    "clip": "optimizer",
    "optimizer": "optimizer",
}
"""The plan's phases in the words of a diagnosis."""


def replanned(diagnosis: Diagnosis, request: Request, *, use_cache: bool = True) -> Diagnosis:
    """The diagnosis with the plan of the same run; on the text's card where the request names none."""
    from memplan.plan import check

    event = diagnosis.events[0] if diagnosis.events else None
    if not request.cards and event is not None:
        request = replace(request, cards=_card_of(event.figures))
    return replace(diagnosis, replan=compare(check(request, use_cache=use_cache), event))


def compare(plan: Plan, event: Event | None) -> Replan:
    """What the plan says to the figures of the first failure."""
    comparisons = tuple(_comparisons(plan, event)) if event is not None else ()
    differences = tuple(_differences(plan, event, comparisons)) if event is not None else ()
    known = any(c.stated_bytes is not None and c.planned_bytes is not None for c in comparisons)
    return Replan(
        verdict=plan.verdict,
        reason=plan.reason,
        agrees=not differences if known else None,
        comparisons=comparisons,
        differences=differences,
        recommendation=_recommendation(plan),
    )


def _card_of(figures: Figures) -> tuple[CardSpec, ...]:
    if figures.total_bytes is None:
        return ()
    return (
        CardSpec(
            name=format_bytes(figures.total_bytes),
            total_bytes=figures.total_bytes,
            total_known="seen",
            used_bytes=figures.other_process_bytes or 0,
        ),
    )


def _comparisons(plan: Plan, event: Event) -> Iterable[Comparison]:
    figures = event.figures
    if plan.failure is not None:
        planned = plan.failure.requested_bytes, plan.failure.allocated_bytes, plan.failure.reserved_bytes
    elif plan.estimate is not None:
        peak = plan.estimate.ranks[0]
        planned = None, peak.peak_allocated_bytes, peak.peak_reserved_bytes  # type: ignore[assignment]
    else:
        return
    reserved = figures.reserved_bytes
    if (
        reserved is None
        and figures.allocated_bytes is not None
        and figures.reserved_unallocated_bytes is not None
    ):
        reserved = figures.allocated_bytes + figures.reserved_unallocated_bytes
    stated = figures.requested_bytes, figures.allocated_bytes, reserved
    for name, said, expected in zip(("requested", "allocated", "reserved"), stated, planned, strict=True):
        yield Comparison(name=name, stated_bytes=said, planned_bytes=expected)


def _differences(plan: Plan, event: Event, comparisons: Iterable[Comparison]) -> Iterable[str]:
    if plan.verdict == "unknown":
        return
    if plan.failure is None:
        yield (
            "the plan fits and the run did not: options, lengths, versions or other users of the card differ "
            "from what was given here"
        )
    elif event.phase != "unknown" and _PHASES.get(plan.failure.phase, event.phase) != event.phase:
        yield f"the text fails in {event.phase}, the plan in {plan.failure.phase}"
    for c in comparisons:
        if c.name != "requested" and c.stated_bytes and c.planned_bytes:
            difference = c.planned_bytes / c.stated_bytes - 1
            if abs(difference) > AGREES_WITHIN:
                yield (
                    f"{c.name}: {format_bytes(c.stated_bytes)} in the text, "
                    f"{format_bytes(c.planned_bytes)} in the "
                    f"plan ({difference:+.0%})"
                )


def _recommendation(plan: Plan) -> str | None:
    from memplan.plan.alternatives import as_options

    for alternative in plan.alternatives:
        if alternative.verdict in ("fits", "tight"):
            return f"`{as_options(alternative.change)}`: it {alternative.reason}"
    return None
