"""Timeline → allocator → `Estimate`: what a card holds, by phase and by what it is for. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from memplan.request.types import Origin, Request

Verdict = Literal["fits", "tight", "does not fit", "unknown"]


@dataclass(frozen=True, kw_only=True)
class PhaseUse:
    """The peaks within one phase, over all its steps."""

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class RankEstimate:
    """What one process holds on its card.

    `breakdown_bytes` splits `peak_allocated_bytes` by category at the moment of the peak, then adds
    `allocator_cache` (reserved beyond that) and `cuda_context`; keys are `memplan.timeline.Category`
    names in lower case. `reserved_range_bytes` is the least and the most over the segment address
    layouts that a driver may choose.
    """

    rank: int
    device: str
    total_bytes: int | None
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    reserved_range_bytes: tuple[int, int]
    non_torch_bytes: int | None
    phases: Mapping[str, PhaseUse]
    train: PhaseUse
    """Over the steps alone, without loading and preparing: what the measured rows call `train_peak_*`."""
    breakdown_bytes: Mapping[str, int]
    peak_operator: str
    peak_module: str
    peak_phase: str
    peak_step: int

    @property
    def needed_bytes(self) -> int | None:
        """Reserved by torch and taken beside it; None where the second is not known."""
        return None if self.non_torch_bytes is None else self.peak_reserved_bytes + self.non_torch_bytes


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Where a job that does not fit runs out: asked for `requested_bytes` with `allocated_bytes` held."""

    rank: int
    phase: str
    step: int
    operator: str
    module: str
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    capacity_bytes: int
    """What torch may take of the card: its total less `non_torch_bytes` and other processes'."""
    total_bytes: int | None = None
    """The card's; None where it isn't known."""

    @property
    def unused_bytes(self) -> int:
        """Reserved by torch and in no block, in pieces that none of them serve the request."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def kind(self) -> Literal["capacity", "fragmentation"]:
        """Whether there is too little, or enough in pieces that are too small."""
        enough = self.allocated_bytes + self.requested_bytes <= self.capacity_bytes
        return "fragmentation" if enough else "capacity"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory of a job: one entry a rank, equal ranks included. `facts` are the model's and the trace's."""

    request: Request
    ranks: tuple[RankEstimate, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What lowers the confidence in the answer: an unverified version, an estimated constant."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """The same job with something changed, planned like the first."""

    change: Mapping[str, Any]
    """Field of `Request` → the new value."""
    verdict: Verdict
    reason: str
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer of `memplan check`."""

    request: Request
    """With every default resolved."""
    verdict: Verdict
    reason: str
    """One sentence for the verdict, with its figures."""
    estimate: Estimate | None
    """None where the verdict is unknown."""
    failure: Failure | None = None
    alternatives: tuple[Alternative, ...] = ()
    hints: tuple[str, ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False

    def _repr_html_(self) -> str:
        """The report in a notebook. The one import against the flow of data, made only then."""
        from memplan.report.notebook import plan_to_html

        return plan_to_html(self)
