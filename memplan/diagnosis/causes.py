"""Why it ran out, from the figures: each answer with the arithmetic that led to it."""

from __future__ import annotations

import re

from memplan.diagnosis.types import Cause, Event, Figures
from memplan.units import format_bytes

HUGE = 0.4
"""A request of this share of the card is one tensor too large, whatever else is there."""
CACHED = 0.05
"""Less than this share of the card, held but unused, is what every run has."""
_LARGER_THAN_CARDS = 64 << 30
OTHERS = 0.15
_CONTEXT_BYTES = 600 << 20
"""A CUDA context, which old messages leave out."""
_LEAK = re.compile(
    r"(?i)memory leak|leak(?:s|ing|ed)? memory|memory (?:keeps|kept) (?:grow|increas|climb)|"
    r"(?:usage|memory) (?:grows|increases|growing|increasing) (?:every|each|with|over|gradually|until)|"
    r"after (?:several|a few|some|many|\d{1,6}) (?:times|calls|requests|iterations|steps|epochs)|"
    r"\d{1,4} times [^\n]{0,80}memory|gradually (?:increas|grow)|accumulat\w{1,4} (?:over|across) (?:steps|requests)"
)
_OTHERS_SAID = re.compile(
    r"(?i)other process(?:es)?|another process|zombie process|(?:was|were|is) (?:holding|occupied|occupying)|"
    r"already (?:in use|running) (?:on|by)|用户占用|被占用|占用了"
)

Judged = tuple[Cause, tuple[str, ...]]


def cause_of(event: Event, around: str) -> Judged:
    """The cause, with its evidence; `around` is the text near the message."""
    if event.kind in ("host_oom", "shm"):
        return "host_ram", (_HOST[event.kind],)
    if event.kind == "not_oom" and "shared" not in event.message:
        return "unknown", (_CONFIG["not_oom"],)
    if event.kind in ("not_oom", "compat", "load_dispatch"):
        return "config", (_CONFIG[event.kind],)
    if event.kind in ("vllm_kv", "sglang_kv"):
        return _engine(event)
    figures = event.figures
    if "more than 1EB" in event.message:
        return "config", (
            "a size of more than 1 EB was asked for: it was computed wrong or read from bad data",
        )
    for judge in (_huge, _fragmented, _others, _capped):
        judged = judge(figures)
        if judged is not None:
            return judged
    if _LEAK.search(around):
        return "leak", ("the text says that memory grew from call to call",)
    return _rest(event, around)


def held_by_others(figures: Figures) -> int | None:
    """What the card holds that this process doesn't, as far as the message tells."""
    if figures.other_process_bytes is not None:
        return figures.other_process_bytes
    own = own_bytes(figures)
    if figures.total_bytes is None or figures.free_bytes is None or own is None:
        return None
    return max(figures.total_bytes - figures.free_bytes - own, 0)


def own_bytes(figures: Figures) -> int | None:
    """What this process holds; old messages leave the context out."""
    if figures.process_bytes is not None:
        return figures.process_bytes
    reserved = reserved_bytes(figures)
    return None if reserved is None else reserved + _CONTEXT_BYTES


def reserved_bytes(figures: Figures) -> int | None:
    """What the allocator holds of the card, where the message tells."""
    if figures.reserved_bytes is not None:
        return figures.reserved_bytes
    if figures.allocated_bytes is None or figures.reserved_unallocated_bytes is None:
        return None
    return figures.allocated_bytes + figures.reserved_unallocated_bytes


def cached_bytes(figures: Figures) -> int | None:
    """Held by the allocator and not in use."""
    if figures.reserved_unallocated_bytes is not None:
        return figures.reserved_unallocated_bytes
    if figures.reserved_bytes is None or figures.allocated_bytes is None:
        return None
    return max(figures.reserved_bytes - figures.allocated_bytes, 0)


def _huge(figures: Figures) -> Judged | None:
    asked, total = figures.requested_bytes, figures.total_bytes
    if asked is not None and total is None and asked >= _LARGER_THAN_CARDS:
        return "single_huge_allocation", (f"one request is for {format_bytes(asked)}",)
    if asked is None or total is None or asked < HUGE * total:
        return None
    share = f"{asked / total:.0%}" if asked <= total else f"{asked / total:.1f} times"
    return "single_huge_allocation", (
        f"one request is for {format_bytes(asked)}, {share} of the card's {format_bytes(total)}",
    )


def _fragmented(figures: Figures) -> Judged | None:
    cached, asked, total = cached_bytes(figures), figures.requested_bytes, figures.total_bytes
    if cached is None or asked is None or cached < asked:
        return None
    if total is not None and cached < CACHED * total:
        return None
    return "fragmentation", (
        f"{format_bytes(cached)} were reserved and not in use, more than the {format_bytes(asked)} asked "
        "for, but in no piece that is large enough",
    )


def _others(figures: Figures) -> Judged | None:
    held, asked, total = held_by_others(figures), figures.requested_bytes, figures.total_bytes
    if held is None or total is None or held < OTHERS * total or (asked is not None and held < asked):
        return None
    if figures.other_process_bytes is None and held < 0.25 * total:
        return None
    stated = "" if figures.other_process_bytes is not None else ", by what is left of the card's total"
    return "other_process", (
        f"other processes held {format_bytes(held)} of the card's {format_bytes(total)}{stated}",
    )


def _capped(figures: Figures) -> Judged | None:
    allowed, asked, free = figures.allowed_bytes, figures.requested_bytes, figures.free_bytes
    if allowed is None or asked is None or free is None or free < asked:
        return None
    return "config", (
        f"a setting allows this process {format_bytes(allowed)}, while {format_bytes(free)} of the card were free",
    )


def _engine(event: Event) -> Judged:
    figures = event.figures
    if figures.total_bytes is not None and figures.free_bytes is not None:
        held = figures.total_bytes - figures.free_bytes
        return "other_process", (f"{format_bytes(held)} of the card were in use before the engine started",)
    if figures.requested_bytes is not None and figures.free_bytes is not None:
        return "kv_cache", (
            f"the cache needs {format_bytes(figures.requested_bytes)} and {format_bytes(figures.free_bytes)} are left",
        )
    return "kv_cache", ("the weights leave too little of the engine's share for the cache",)


def _rest(event: Event, around: str) -> Judged:
    figures = event.figures
    asked, free, allocated = figures.requested_bytes, figures.free_bytes, figures.allocated_bytes
    if event.kind in ("cuda_error_oom", "ggml_oom", "paddle_oom") and _OTHERS_SAID.search(around):
        return "other_process", ("the text speaks of another user of the card",)
    if asked is not None and free is not None and free >= asked and figures.allowed_bytes is None:
        return "unknown", (
            f"{format_bytes(free)} were free, more than the {format_bytes(asked)} asked for: the driver refused",
        )
    if event.kind == "cuda_error_oom" and event.phase == "load":
        return "other_process", (
            "CUDA itself refused before the allocator held anything: the card was full when this process came",
        )
    if event.kind == "ggml_oom" and re.search("kv cache|KV cache", around):
        return "kv_cache", ("it was the buffer of the KV cache",)
    if event.kind in ("cuda_error_oom", "cublas_alloc", "cudnn_alloc", "xpu_oom"):
        return "unknown", ("the message states no figures",)
    if allocated is not None and figures.total_bytes is not None:
        return "capacity", (
            f"{format_bytes(allocated)} of {format_bytes(figures.total_bytes)} were in use by this process",
        )
    if figures.total_bytes is not None and figures.process_bytes is None and free is not None:
        used = figures.total_bytes - free
        if used < 0.9 * figures.total_bytes:
            return "unknown", (f"{format_bytes(used)} of the card were in use; by whom isn't said",)
    if event.kind == "cuda_oom" and allocated is None and figures.process_bytes is None and free is None:
        return "unknown", ("the message doesn't say what filled the card",)
    if (
        asked is not None
        or allocated is not None
        or event.kind in ("metal_oom", "nccl_oom", "tf_oom", "jax_oom")
    ):
        return "capacity", ("no other reason can be read from the message",)
    return "unknown", ("the message states no figures",)


_HOST = {
    "host_oom": "it was the host's memory that ran out, not the GPU's",
    "shm": "shared memory between processes ran out, which is the host's",
}
_CONFIG = {
    "not_oom": "no GPU or host memory ran out: the message is about something else",
    "compat": "the versions or arguments at hand don't go together",
    "load_dispatch": "accelerate put a part of the model off the GPU, since it judged that it would not fit",
}
