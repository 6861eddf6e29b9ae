"""What a text says of running out of memory, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "cuda_oom", "hip_oom", "xpu_oom", "mps_oom", "npu_oom", "metal_oom", "jax_oom", "tf_oom", "paddle_oom",
    "ort_oom", "ggml_oom", "cupy_oom", "cuda_error_oom", "cublas_alloc", "cudnn_alloc", "nccl_oom", "vllm_kv",
    "sglang_kv", "host_oom", "shm", "load_dispatch", "not_oom", "compat",
]  # fmt: skip
Phase = Literal[
    "load", "forward", "loss", "backward", "optimizer", "eval", "generate", "save", "data", "unknown"
]
Cause = Literal[
    "capacity", "fragmentation", "other_process", "single_huge_allocation", "host_ram", "kv_cache", "config",
    "leak", "unknown",
]  # fmt: skip

NOT_MEMORY: frozenset[str] = frozenset({"load_dispatch", "not_oom", "compat"})
"""Kinds that stop a run without anything having run out."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The sizes that a message states, in bytes; None where it doesn't state one."""

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
    """The share of the card that a setting leaves to the process."""
    private_pools_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that went wrong, with what the text tells of it."""

    kind: Kind
    framework: str
    figures: Figures
    rank: int | None
    line: int
    """Of the message, from 1."""
    message: str
    phase: Phase = "unknown"
    cause: Cause = "unknown"
    evidence: tuple[str, ...] = ()
    fixes: tuple[str, ...] = ()
    futile: tuple[str, ...] = ()
    """Advice of the message that does not help here, and why."""
    echo_of: int | None = None
    """Index of the event that this one follows from."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """An error of the compatibility data, found in a text or in an environment."""

    id: str
    title: str
    cause: str
    fix: str
    source: str
    line: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The answer: events in order, the first cause first; `n_ooms` of them ran out of memory."""

    events: tuple[Event, ...]
    compat: tuple[Known, ...]
    n_ooms: int
    lines: int
    comparison: Mapping[str, Any] | None = None
    """What a plan of the run says, where one was asked for."""
