"""A plan as a program reads it. `plan.schema.json`, beside this file, says what each field means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from memplan.estimate import Alternative, Estimate, Failure, Plan, RankEstimate
from memplan.report.words import torch_message
from memplan.request.types import Origin


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The answer of `check`, of JSON's own types alone; `ranks` is empty where the verdict is unknown."""
    return {
        "verdict": plan.verdict,
        "reason": plan.reason,
        "ranks": _ranks(plan.estimate),
        "failure": None if plan.failure is None else _failure(plan.failure),
        "alternatives": [_alternative(alternative) for alternative in plan.alternatives],
        "hints": list(plan.hints),
        "notes": list(plan.estimate.notes) if plan.estimate else [],
        "origins": _origins(plan.origins or plan.request.origins),
        "versions": dict(plan.versions),
        "seconds": plan.seconds,
        "cached": plan.cached,
    }


def _failure(failure: Failure) -> dict[str, Any]:
    return {**asdict(failure), "kind": failure.kind, "message": torch_message(failure)}


def _ranks(estimate: Estimate | None) -> list[dict[str, Any]]:
    return [_rank(rank) for rank in estimate.ranks] if estimate else []


def _rank(rank: RankEstimate) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "device": rank.device,
        "total_bytes": rank.total_bytes,
        "peak_allocated_bytes": rank.peak_allocated_bytes,
        "peak_reserved_bytes": rank.peak_reserved_bytes,
        "reserved_range_bytes": list(rank.reserved_range_bytes),
        "non_torch_bytes": rank.non_torch_bytes,
        "phases": {name: asdict(use) for name, use in rank.phases.items()},
        "breakdown_bytes": dict(rank.breakdown_bytes),
        "peak_operator": rank.peak_operator,
        "peak_module": rank.peak_module,
        "peak_phase": rank.peak_phase,
        "peak_step": rank.peak_step,
    }


def _alternative(alternative: Alternative) -> dict[str, Any]:
    return {
        "change": {name: _plain(value) for name, value in alternative.change.items()},
        "verdict": alternative.verdict,
        "reason": alternative.reason,
        "ranks": _ranks(alternative.estimate),
    }


def _origins(origins: Mapping[str, Origin]) -> dict[str, Any]:
    return {
        name: {"value": _plain(origin.value), "stated": origin.stated, "where": origin.where}
        for name, origin in origins.items()
    }


def _plain(value: Any) -> Any:
    """A field's value in JSON's types; anything richer as its text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
