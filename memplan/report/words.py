"""What the reports of a plan have in common: names, orders and sentences, without any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memplan.estimate import Estimate, Failure, Plan, RankEstimate
from memplan.plan.alternatives import as_options
from memplan.report.text import clean_line
from memplan.request.types import Origin, Request
from memplan.units import GIB, KIB, MIB, format_bytes, parse_bytes

UNKNOWN = "unknown"
CATEGORIES: Mapping[str, str] = {
    "parameters": "parameters",
    "adapters": "adapters",
    "buffers": "buffers",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "saved activations",
    "temporaries": "temporaries",
    "logits_and_loss": "temporaries: logits and loss",
    "inputs": "inputs",
    "workspaces": "workspaces",
    "communication": "communication",
    "allocator_cache": "allocator cache",
    "cuda_context": "CUDA context",
}
"""Keys of `RankEstimate.breakdown_bytes`, in the order of the report, and what a person reads."""
_OUTSIDE_TORCH = "cuda_context"


@dataclass(frozen=True, kw_only=True)
class Card:
    """Cards that hold the same, shown once."""

    rank: RankEstimate
    """One of them."""
    ranks: tuple[int, ...]
    used_bytes: int
    """Held by other processes."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A row of a card's table; `size_bytes` is None where it isn't known."""

    key: str
    label: str
    size_bytes: int | None


def cards(estimate: Estimate) -> list[Card]:
    """The cards, equal ones together, in the order of their first rank."""
    groups: list[tuple[RankEstimate, int, list[int]]] = []
    for rank in estimate.ranks:
        used = _used_bytes(estimate.request, rank.rank)
        anonymous = replace(rank, rank=0)
        for known, known_used, members in groups:
            if known == anonymous and known_used == used:
                members.append(rank.rank)
                break
        else:
            groups.append((anonymous, used, [rank.rank]))
    return [Card(rank=rank, ranks=tuple(members), used_bytes=used) for rank, used, members in groups]


def card_title(card: Card) -> str:
    """`3 × 23.64GiB, ranks 0–2`."""
    device = clean_line(card.rank.device)
    total = card.rank.total_bytes
    if total is not None and parse_bytes(device) != total and format_bytes(total) not in device:
        device += f" ({format_bytes(total)})"
    return f"{len(card.ranks)} × {device}, {_ranks_text(card.ranks)}"


def card_use(card: Card) -> str:
    """`9.47 GiB reserved + 0.75 GiB context, of 23.64 GiB`."""
    rank = card.rank
    least, most = (size_text(size).removesuffix(" GiB") for size in rank.reserved_range_bytes)
    text = f"{size_text(rank.peak_reserved_bytes)} reserved"
    if least != most:
        text += f" ({least}–{most}, by where segments lie)"
    text += f" + {size_text(rank.non_torch_bytes)} context"
    if card.used_bytes:
        text += f" + {size_text(card.used_bytes)} of other processes"
    return f"{text}, of {size_text(rank.total_bytes)}"


def parts(card: Card) -> list[Part]:
    """The rows of a card's table: what is there at the peak, then what is free or missing."""
    sizes = card.rank.breakdown_bytes
    names = [name for name in CATEGORIES if sizes.get(name)] + [
        name for name in sizes if name not in CATEGORIES
    ]
    rows = [
        Part(key=name, label=CATEGORIES.get(name, clean_line(name).replace("_", " ")), size_bytes=sizes[name])
        for name in names
        if name != _OUTSIDE_TORCH
    ]
    context = card.rank.non_torch_bytes
    rows.append(Part(key=_OUTSIDE_TORCH, label=CATEGORIES[_OUTSIDE_TORCH], size_bytes=context))
    if card.used_bytes:
        rows.append(Part(key="others", label="other processes", size_bytes=card.used_bytes))
    free = free_bytes(card)
    if free is not None and free < 0:
        rows.append(Part(key="missing", label="missing", size_bytes=-free))
    else:
        rows.append(Part(key="free", label="free", size_bytes=free))
    return rows


def free_bytes(card: Card) -> int | None:
    """What is left of the card, negative where it isn't enough; None where it isn't known."""
    needed, total = card.rank.needed_bytes, card.rank.total_bytes
    return None if needed is None or total is None else total - needed - card.used_bytes


def peak_sentence(rank: RankEstimate) -> str:
    """Where the peak is."""
    at = f"at {clean_line(rank.peak_operator)}"
    if rank.peak_module:
        at += f" in {clean_line(rank.peak_module)}"
    peak = size_text(rank.peak_allocated_bytes)
    return f"Peak of {peak} allocated: {_when(rank.peak_phase, rank.peak_step)}, {at}"


def failure_sentence(failure: Failure) -> str:
    """Where the job runs out, with the figures of torch's own message."""
    at = f"at {clean_line(failure.operator)}"
    if failure.module:
        at += f" in {clean_line(failure.module)}"
    asked, allocated, reserved, capacity = map(
        format_bytes,
        (failure.requested_bytes, failure.allocated_bytes, failure.reserved_bytes, failure.capacity_bytes),
    )
    return (
        f"Rank {failure.rank} runs out in {_when(failure.phase, failure.step)}, {at}: it asks for {asked} "
        f"with {allocated} allocated and {reserved} reserved, of {capacity} that torch may take "
        f"({_KINDS[failure.kind]})"
    )


_KINDS = {"capacity": "too little in all", "fragmentation": "enough in all, but in pieces that are too small"}


def torch_message(failure: Failure) -> str:
    """What torch itself will say, for a search through logs; the process's own total is left out."""
    total = "an unknown amount" if failure.total_bytes is None else _torch_size(failure.total_bytes)
    requested, allocated, unused = map(
        _torch_size, (failure.requested_bytes, failure.allocated_bytes, failure.unused_bytes)
    )
    free = _torch_size(max(failure.capacity_bytes - failure.reserved_bytes, 0))
    return (
        f"CUDA out of memory. Tried to allocate {requested}. GPU {failure.rank} has a total capacity of "
        f"{total} of which {free} is free. Of the allocated memory {allocated} is allocated by PyTorch, and "
        f"{unused} is reserved by PyTorch but unallocated."
    )


def _torch_size(size_bytes: int) -> str:
    """`format_size` of c10/cuda/CUDACachingAllocator.cpp."""
    for factor, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes > factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes} bytes"


def change_text(change: Mapping[str, Any]) -> str:
    """A change as the options that make it: `--load_in_4bit --max_length 512`."""
    return clean_line(as_options(change))


def assumed(origins: Mapping[str, Origin]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Where a default comes from, and the fields with their values that do; the singular first."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, origin in origins.items():
        if not origin.stated:
            groups.setdefault(clean_line(origin.where).replace("`", ""), []).append(
                (clean_line(name), value_text(origin.value))
            )
    return sorted(groups.items(), key=lambda group: len(group[1]))


def value_text(value: Any) -> str:
    """A field's value as one would type it."""
    if value is None:
        return "not set"
    if isinstance(value, list | tuple):
        return clean_line(" ".join(map(str, value)))
    return clean_line(value)


def size_text(size_bytes: int | None) -> str:
    """A size, in GiB where two digits show it, or that it isn't known: never 0 in its place."""
    if size_bytes is None:
        return UNKNOWN
    return f"{size_bytes / GIB:.2f} GiB" if abs(size_bytes) >= GIB // 100 else format_bytes(size_bytes)


def sentence(text: str) -> str:
    """Outside text as a sentence of its own."""
    text = clean_line(text)
    return text[:1].upper() + text[1:]


def model_name(request: Request) -> str:
    """The model as the user named it."""
    if isinstance(request.model, str):
        return clean_line(request.model)
    return f"a {clean_line(request.model.get('model_type', 'given'))} config"


def footer(plan: Plan) -> str:
    """Which versions the answer is for, and what it took."""
    versions = ", ".join(
        f"{clean_line(name)} {clean_line(version)}" for name, version in plan.versions.items()
    )
    took = f"{plan.seconds:.1f} s{', from the cache' if plan.cached else ''}"
    return f"For {versions}; {took}" if versions else took


def _when(phase: str, step: int) -> str:
    return clean_line(phase) if step < 0 else f"{clean_line(phase)} of step {step + 1}"


def _ranks_text(ranks: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(spans)}"


def _used_bytes(request: Request, rank: int) -> int:
    return request.cards[rank].used_bytes if rank < len(request.cards) else 0
