"""Why it ran out, and what in the text says so. What the text doesn't settle is called unknown."""

from __future__ import annotations

from memplan.diagnosis.types import Cause, Figures, Finding, Kind, Phase
from memplan.diagnosis.wordings import compiled
from memplan.units import GIB, format_bytes

HUGE_SHARE = 0.4
"""Of the card, from which on the request itself is the problem."""
FRAGMENTED_SHARE = 0.05
"""Of the card, from which on memory that is reserved but in no tensor matters."""
CACHED_INFERRED_SHARE = 0.15
"""The same where only reserved and allocated are stated, as torch did to 2.0."""
OTHERS_STATED_SHARE = 0.25
OTHERS_INFERRED_SHARE = 0.5
OTHERS_TOLD_SHARE = 0.1
"""Of the card. What a message doesn't name may also be this process's own context and libraries."""
ROOM_SHARE = 0.02
"""Of the card, by which the free memory must exceed the request to speak against a lack: torch asks the
driver for whole segments, and the driver keeps some for itself."""
_HUGE_BYTES = 32 * GIB
"""Where the message doesn't say how large the card is."""
_LEAK = (
    r"memory leak|leaks? memory|keeps? (?:growing|increasing|rising)|grows? (?:every|each|over|with|until)"
    r"|(?:gradually|steadily) (?:grow|increas|fill)|(?:越来越|逐渐|不断)(?:大|增|多)"
    r"|after (?:\d+|several|a few"
    r"|many) (?:steps|iterations|epochs|requests|calls)"
    r"|\b\d+ times\b.{0,80}(?:fill|full)"
)
_OTHERS = (
    r"something else is (?:using|on|holding)|(?:was|is|were|are) (?:still )?occupied\b|"
    r"(?:another|other) (?:process|job|model|program)\w{0,2} (?:is|was|are|already|holds?|holding|using"
    r"|uses?|took|on)"
    r"|(?:was|is|were|are) (?:still )?(?:holding|occupying|occupied by|taken by|already using)"
    r"|all (?:cards|ranks|workers|processes) .{0,30}(?:same|first) (?:gpu|card)"
    r"|挤到|占用|被占|zajęte przez"
)
_TOO_LARGE = (
    r"batch.{0,24}(?:过大|太大|调小|too (?:large|big|high))|(?:too (?:large|big)|larger?) (?:a )?(?:batch"
    r"|model)|(?:reduc|lower|decreas|shrink)\w{0,4} (?:the |your )?batch"
    r"|smaller (?:batch|model)|显存(?:不足|不够)|无剩余|放不下|(?:n't|not) fit\b|not enough (?:gpu|video|v)"
)
_TORCH: frozenset[Kind] = frozenset({"cuda_oom", "hip_oom", "xpu_oom", "npu_oom", "mps_oom", "paddle_oom"})
_FIXED: dict[Kind, Cause] = {
    "host_oom": "host_ram",
    "shm": "host_ram",
    "compat": "config",
    "load_dispatch": "config",
    "sglang_kv": "kv_cache",
}
_USUAL: dict[Kind, Cause] = {
    "nccl_oom": "capacity",
    "ggml_oom": "capacity",
    "metal_oom": "capacity",
    "jax_oom": "capacity",
    "tf_oom": "capacity",
    "cupy_oom": "capacity",
    "ort_oom": "capacity",
    "cublas_alloc": "capacity",
    "cudnn_alloc": "capacity",
}
"""These report with no figures of the card, and their pools hold nearly all of it."""

_IF_NOT_AN_INDEX = (
    "its handle needs memory that a full card doesn't have; an index out of range before it looks the same",
)
Answer = tuple[Cause, tuple[str, ...]]


def cause_of(finding: Finding, phase: Phase) -> Answer:
    """The cause, with the evidence for it."""
    kind, figures = finding.kind, finding.figures
    if kind in _FIXED:
        return _FIXED[kind], ()
    if kind == "not_oom":
        return _look_alike(finding)
    if kind == "vllm_kv":
        return _vllm(finding)
    if "than 1eb memory" in finding.message.lower():
        return "config", (
            "the size asked for is no real size: it was read from corrupt or desynchronised data",
        )
    if _says(finding, _LEAK):
        return "leak", ("the text says that use grows over time",)
    if kind in _TORCH:
        return _of_a_card(finding)
    if kind in ("ggml_oom", "metal_oom") and _says(finding, r"kv[ -]cache|kv buffer|n_ctx"):
        return "kv_cache", ("the text names the KV cache",)
    if _says(finding, _OTHERS):
        return "other_process", ("the text speaks of something else that holds the card",)
    if _is_huge(finding):
        return "single_huge_allocation", (_huge(figures.requested_bytes),)
    if kind in _USUAL and "not_initialized" not in finding.message.lower():
        return _USUAL[kind], _IF_NOT_AN_INDEX if kind in ("cublas_alloc", "cudnn_alloc") else ()
    return _by_its_own_words(finding, "the message states no sizes, so the cause can't be told from it")


def _by_its_own_words(finding: Finding, unless: str) -> Answer:
    """The cause that the text around puts it down to, for messages that say nothing themselves."""
    if _says(finding, _OTHERS):
        return "other_process", ("the text speaks of something else that holds the card",)
    if _says(finding, _TOO_LARGE):
        return "capacity", (
            "the message states no sizes; the text around it speaks of too large a batch or model",
        )
    return "unknown", (unless,)


def others_bytes(figures: Figures) -> tuple[int, bool] | None:
    """What other processes hold, and whether the message says so or it is only what is left over."""
    stated = figures.other_process_bytes
    if figures.total_bytes is None or figures.free_bytes is None:
        return None if stated is None else (stated, True)
    used = figures.total_bytes - figures.free_bytes
    if figures.process_bytes is not None:
        return max(stated or 0, used - figures.process_bytes, 0), True
    if stated is not None:
        return stated, True
    own = figures.reserved_bytes
    if own is None and figures.allocated_bytes is not None and figures.reserved_unallocated_bytes is not None:
        own = figures.allocated_bytes + figures.reserved_unallocated_bytes
    return None if own is None else (max(0, used - own), False)


def _of_a_card(finding: Finding) -> Answer:
    f = finding.figures
    requested, total, free, cached = f.requested_bytes, f.total_bytes, f.free_bytes, f.cached_bytes
    if cached is not None and total and requested is not None and _is_fragmented(f, cached, requested, total):
        text = (
            f"{format_bytes(cached)} were reserved and in no tensor, more than the "
            f"{format_bytes(requested)} asked for"
        )
        return "fragmentation", (f"{text}, but in no piece large enough",)
    if f.allowed_bytes is not None:
        return "config", (
            f"the process may take only {format_bytes(f.allowed_bytes)}{_of(total)}: a cap is set",
        )
    if requested is None and total is None:
        return "unknown", ("the message is cut off before its figures",)
    capacity = total or _known_use(f)
    if requested is not None and (
        requested >= HUGE_SHARE * capacity if capacity else requested >= 2 * _HUGE_BYTES
    ):
        return "single_huge_allocation", (_huge(requested, total),)
    if requested is not None and free is not None and free >= requested + ROOM_SHARE * (total or 0):
        text = f"{format_bytes(free)} were free, more than the {format_bytes(requested)} asked for"
        return "unknown", (f"{text}: no lack of memory that this message shows",)
    others = others_bytes(f)
    if others is not None and total:
        share = OTHERS_STATED_SHARE if others[1] else OTHERS_INFERRED_SHARE
        if others[0] >= share * total:
            how = "hold" if others[1] else "must hold"
            return "other_process", (f"other processes {how} {format_bytes(others[0])}{_of(total)}",)
        if others[0] >= OTHERS_TOLD_SHARE * total and _says(finding, _OTHERS):
            return "other_process", ("the text speaks of something else that holds the card",)
    return _capacity(finding, requested, total, free, cached)


def _is_fragmented(f: Figures, cached: int, requested: int, total: int) -> bool:
    is_stated = f.reserved_unallocated_bytes is not None
    share = FRAGMENTED_SHARE if is_stated else CACHED_INFERRED_SHARE
    # Windows lets a process reserve beyond the card: then the card is full, whatever is cached
    return cached >= max(requested, share * total) and (f.reserved_bytes or 0) <= total


def _capacity(
    finding: Finding, requested: int | None, total: int | None, free: int | None, cached: int | None
) -> Answer:
    f = finding.figures
    held = f.process_bytes or f.reserved_bytes or f.allocated_bytes
    if finding.kind == "mps_oom":
        most = (
            "more than it may take" if total is None else f"more than the {format_bytes(total)} it may take"
        )
        return "capacity", (f"the request would need {most}",)
    if free == 0 and f.allocated_bytes == 0:
        return "unknown", ("its figures are all zero: the library could not read the card",)
    if total is None and free is None:
        return _by_its_own_words(finding, "the message doesn't say what the card holds")
    if free is None and (held is None or (total and held < 0.5 * total)):
        return _by_its_own_words(finding, "the message doesn't say what was free")
    evidence = []
    if held is not None:
        evidence.append(f"this process itself holds {format_bytes(held)}{_of(total)}")
    elif free is not None:
        evidence.append(f"{format_bytes(free)}{_of(total)} were free")
    if cached is not None:
        evidence.append(f"not fragmentation: {format_bytes(cached)} were cached and unused")
    return "capacity", tuple(evidence)


def _known_use(f: Figures) -> int | None:
    """A lower bound of the card's size, where the message doesn't state it."""
    if f.allocated_bytes is None or f.free_bytes is None:
        return None
    return f.allocated_bytes + f.free_bytes


def _vllm(finding: Finding) -> Answer:
    f = finding.figures
    if "on startup" in finding.message or "free memory on device" in finding.message.lower():
        if f.total_bytes and f.free_bytes is not None and f.total_bytes - f.free_bytes > 0.1 * f.total_bytes:
            used = format_bytes(f.total_bytes - f.free_bytes)
            return "other_process", (f"{used}{_of(f.total_bytes)} were taken before the engine started",)
        return "config", ("gpu_memory_utilization asks for more than the card has free at startup",)
    return "kv_cache", ("what is left after the weights is too little for the KV cache of this length",)


def _look_alike(finding: Finding) -> Answer:
    if finding.framework in ("triton",) or "too many resources" in finding.message.lower():
        return "config", (
            "the kernel asks for more on-chip memory than this GPU has; the card's memory isn't short",
        )
    if finding.framework in ("java", "javascript"):
        return "host_ram", ("a virtual machine's own heap, not a GPU",)
    return "unknown", ()


def _is_huge(finding: Finding) -> bool:
    requested = finding.figures.requested_bytes
    if requested is not None:
        return requested >= _HUGE_BYTES
    shape = compiled(r"shape ?\[([\d, ]{1,120})\]").search(finding.message.lower())
    elements = 1
    for size in shape[1].split(",") if shape else ():
        elements *= int(size or 1)
    return elements >= _HUGE_BYTES // 4


def _huge(requested: int | None, total: int | None = None) -> str:
    asked = "one tensor" if requested is None else f"one request of {format_bytes(requested)}"
    return (
        f"{asked} is most of a card by itself"
        if total is None
        else f"{asked} alone is {_share(requested, total)} of the card"
    )


def _share(part: int | None, total: int) -> str:
    return f"{(part or 0) / total:.0%}" if (part or 0) < 10 * total else f"{(part or 0) / total:,.0f} times"


def _says(finding: Finding, pattern: str) -> bool:
    return compiled(pattern).search(finding.around.lower()) is not None


def _of(total: int | None) -> str:
    return "" if total is None else f" of {format_bytes(total)}"
