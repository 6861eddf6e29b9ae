"""What a diagnosis says, as data. What a text doesn't state is None, and "unknown" where a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "cuda_oom", "hip_oom", "xpu_oom", "npu_oom", "mps_oom", "metal_oom", "cuda_error_oom", "cublas_alloc",
    "cudnn_alloc", "nccl_oom", "cupy_oom", "ggml_oom", "jax_oom", "tf_oom", "paddle_oom", "ort_oom",
    "vllm_kv", "sglang_kv", "host_oom", "shm", "load_dispatch", "not_oom", "compat",
]  # fmt: skip
Phase = Literal[
    "load", "forward", "loss", "backward", "optimizer", "eval", "generate", "save", "data", "unknown"
]
Cause = Literal[
    "capacity", "fragmentation", "other_process", "single_huge_allocation", "host_ram", "kv_cache",
    "config", "leak", "unknown",
]  # fmt: skip
NOT_OOM: frozenset[Kind] = frozenset({"load_dispatch", "not_oom", "compat"})
"""Recognised, but nothing ran out of memory."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The sizes that a message states, in bytes, and the card that it names."""

    gpu: int | None = None
    requested_bytes: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    reserved_unallocated_bytes: int | None = None
    process_bytes: int | None = None
    other_process_bytes: int | None = None
    allowed_bytes: int | None = None
    """The cap that a process put on itself, where there is one."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was stated."""
        return self == Figures()

    @property
    def cached_bytes(self) -> int | None:
        """Held by the allocator and in no tensor."""
        if self.reserved_unallocated_bytes is not None:
            return self.reserved_unallocated_bytes
        if self.reserved_bytes is None or self.allocated_bytes is None:
            return None
        return max(0, self.reserved_bytes - self.allocated_bytes)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A place in a traceback, as far as the text shows it."""

    path: str
    function: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A failure as it was read from a text, before anything is concluded from it."""

    kind: Kind
    framework: str
    line: int
    """Where its message begins, counted from 1."""
    message: str
    """The text of the message on one line, cut to a bounded length."""
    around: str
    """The text just before and after it, for what only prose says."""
    rank: int | None = None
    figures: Figures = field(default_factory=Figures)
    frames: tuple[Frame, ...] = ()
    """Outermost first."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Something to change, most useful first; `helps` is False for advice of the message that won't."""

    text: str
    helps: bool = True


@dataclass(frozen=True, kw_only=True)
class Event:
    """A failure, and what follows from its text."""

    kind: Kind
    framework: str
    figures: Figures
    rank: int | None
    phase: Phase
    cause: Cause
    evidence: tuple[str, ...]
    advice: tuple[Advice, ...]
    line: int
    echoes: int = 0
    """How often the same failure is reported again, by other ranks or in other words."""


@dataclass(frozen=True, kw_only=True)
class CompatMatch:
    """A known conflict of versions or arguments."""

    id: str
    title: str
    cause: str
    versions: str
    fix: str
    source: str
    line: int | None = None
    """None where the installed versions told, not a text."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A figure of the text beside what the plan of the same run predicts."""

    name: str
    stated_bytes: int | None
    planned_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Replan:
    """The run planned again: its verdict, how its figures compare, and what would fit."""

    verdict: str
    reason: str
    agrees: bool | None
    comparisons: tuple[Comparison, ...]
    differences: tuple[str, ...] = ()
    recommendation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The answer of `memplan diagnose`: events in the order of the text, the first cause first."""

    events: tuple[Event, ...] = ()
    compat: tuple[CompatMatch, ...] = ()
    n_ooms: int = 0
    n_lines: int = 0
    replan: Replan | None = None

    @property
    def recognised(self) -> bool:
        """Whether anything was."""
        return bool(self.events or self.compat)

    def to_dict(self) -> dict[str, Any]:
        """The answer as a program reads it."""
        document: dict[str, Any] = {
            "events": [_event_to_dict(event) for event in self.events],
            "compat": [vars(match) for match in self.compat],
            "n_ooms": self.n_ooms,
        }
        if self.replan is not None:
            document["plan"] = vars(self.replan) | {
                "comparisons": [vars(comparison) for comparison in self.replan.comparisons]
            }
        return document


def _event_to_dict(event: Event) -> Mapping[str, Any]:
    figures = event.figures
    return {
        "kind": event.kind,
        "framework": event.framework,
        "gpu": figures.gpu,
        "rank": event.rank,
        "requested_bytes": figures.requested_bytes,
        "total_bytes": figures.total_bytes,
        "free_bytes": figures.free_bytes,
        "allocated_bytes": figures.allocated_bytes,
        "reserved_bytes": figures.reserved_bytes,
        "reserved_unallocated_bytes": figures.reserved_unallocated_bytes,
        "process_bytes": figures.process_bytes,
        "other_process_bytes": figures.other_process_bytes,
        "phase": event.phase,
        "cause": event.cause,
        "evidence": list(event.evidence),
        "fixes": [advice.text for advice in event.advice],
        "line": event.line,
    }
