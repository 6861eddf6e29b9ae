"""The cards of a machine as a person or a program reads them; laid out by hand, since it must be instant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

from memplan.gpus.links import Link
from memplan.gpus.nvml import Unknown, derived, known
from memplan.gpus.probe import Probe, ProbedCard, remarks
from memplan.report.text import clean_line, to_ascii
from memplan.units import GIB, format_bytes

UNKNOWN = "unknown"
_BOLD, _DIM = "1", "2"
_MEMORY = ("GPU", "CUDA", "", "total", "torch sees", "used", "free")
_IDENTITY = ("", "compute", "bf16", "fp8", "ECC", "", "UUID")
_LEAST_COMMAND = 20
_Units = Sequence[tuple[ProbedCard, ProbedCard]]
"""Each card with itself and with each of its slices."""


def probe_to_dict(probe: Probe) -> dict[str, Any]:
    """Of JSON's own types alone: what is not known is null, and `unknown` says why."""
    return {
        "driver": known(probe.driver),
        "cuda": known(probe.cuda),
        "environment": dict(probe.environment),
        "cards": [_card(card) for card in probe.cards],
        "links": [_plain(link) for link in probe.links],
        "visible": [known(card.uuid) for card in probe.visible],
        "complete": probe.is_complete,
    }


def probe_to_gpus(probe: Probe) -> str:
    """What `--gpus` takes for the cards that can be seen, rounded down; `unknown` where there is no size."""
    sizes = (known(card.torch_total_bytes) for card in probe.visible)
    return ",".join(UNKNOWN if size is None else f"{size * 100 // GIB / 100:.2f}GiB" for size in sizes)


def render_probe(probe: Probe, *, width: int = 80, color: bool = False, plain: bool = False) -> str:
    """A table of the cards, then what stands beside it: what they are, processes, links, remarks."""
    lines = [_styled(f"Driver {_word(probe.driver)}, CUDA up to {_word(probe.cuda)}", _DIM, color)]
    environment = (f"{name}={clean_line(value)}" for name, value in probe.environment.items())
    lines += [_styled(line, _DIM, color) for line in environment]
    units = [(card, each) for card in probe.cards for each in (card, *card.slices)]
    table = _columns([_MEMORY, *(_memory(each) for _, each in units)], left=(2,))
    lines += ["", _styled(table[0], _BOLD, color), *table[1:], ""]
    table = _columns([_IDENTITY, *(_identity(card, each) for card, each in units)], left=(0, 5, 6))
    lines += [_styled(table[0], _BOLD, color), *table[1:]]
    lines += _section("Processes", _columns(list(_processes(units, width)), left=(0, 2, 3)), color)
    lines += _section("Links", [_link(link) for link in probe.links], color)
    lines += _section("To know", list(_remarks(units)), color)
    text = "\n".join(line.rstrip() for line in lines)
    return to_ascii(text) if plain else text


def _card(card: ProbedCard) -> dict[str, Any]:
    result = {name: _plain(value) for name, value in vars(card).items() if name != "slices"}
    derived = {"bf16": card.bf16, "fp8": card.fp8, "hidden_bytes": card.hidden_bytes}
    result |= {name: _plain(value) for name, value in derived.items()}
    unknown = {**vars(card), **derived}.items()
    return {
        **result,
        "slices": [_card(each) for each in card.slices],
        "remarks": list(remarks(card)),
        "unknown": {name: value.reason for name, value in unknown if isinstance(value, Unknown)},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Unknown):
        return None
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(each) for name, each in vars(value).items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _memory(each: ProbedCard) -> Sequence[str]:
    torch_total = _size(each.torch_total_bytes)
    is_estimate = not each.torch_total_seen and torch_total != UNKNOWN
    return (
        "" if each.index is None else str(each.index),
        "hidden" if each.ordinal is None else _word(each.ordinal),
        clean_line(_word(each.name)).removeprefix("NVIDIA "),
        _size(each.total_bytes),
        f"~{torch_total}" if is_estimate else torch_total,
        _size(each.used_bytes),
        _size(each.free_bytes),
    )


def _identity(card: ProbedCard, each: ProbedCard) -> Sequence[str]:
    kind = known(each.virtualization)
    return (
        _name(card, each),
        _word(derived(lambda pair: f"{pair[0]}.{pair[1]}", each.compute_capability)),
        _yes(each.bf16),
        _yes(each.fp8),
        _yes(each.ecc),
        "MIG on" if each.mig else kind if kind not in (None, "none") else "",
        clean_line(_word(each.uuid)),
    )


def _processes(units: _Units, width: int) -> Iterator[Sequence[str]]:
    room = max(width - 48, _LEAST_COMMAND)
    for card, each in units:
        name = _name(card, each)
        if isinstance(each.processes, Unknown):
            yield name, "", "", f"unknown: {each.processes.reason}", ""
            continue
        for process in each.processes:
            command, user = clean_line(_word(process.command)), clean_line(_word(process.user))
            shown = command if len(command) <= room else command[: room - 1] + "…"
            yield name, str(process.pid), user, shown, _size(process.used_bytes)
        hidden = known(each.hidden_bytes)
        if hidden and not each.slices:
            yield name, "", "", "not seen from here", _size(hidden)


def _remarks(units: _Units) -> Iterator[str]:
    for card, each in units:
        yield from (f"{_name(card, each)}: {remark}" for remark in remarks(each))
    if any(not each.torch_total_seen and known(each.torch_total_bytes) for _, each in units):
        yield "~ is an estimate: torch's total was not seen on this model"
    reasons = dict.fromkeys(each.ordinal.reason for _, each in units if isinstance(each.ordinal, Unknown))
    yield from (f"CUDA's numbers are unknown: {reason}" for reason in reasons)


def _link(link: Link) -> str:
    count = known(link.nvlinks)
    nvlinks = "NVLink unknown" if count is None else f"{count} NVLinks" if count else "no NVLink"
    return f"{link.cards[0]}–{link.cards[1]}: {nvlinks}, PCIe {_word(link.pcie)}"


def _name(card: ProbedCard, each: ProbedCard) -> str:
    if each is card:
        return f"GPU {card.index}"
    return f"GPU {card.index} slice {'/'.join('?' if i is None else str(i) for i in each.instances)}"


def _section(title: str, lines: Sequence[str], color: bool) -> list[str]:
    return ["", _styled(title, _BOLD, color), *(f"  {line}" for line in lines)] if lines else []


def _columns(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _size(value: int | Unknown) -> str:
    return UNKNOWN if isinstance(value, Unknown) else format_bytes(value)


def _word(value: object) -> str:
    return UNKNOWN if isinstance(value, Unknown) else str(value)


def _yes(value: bool | Unknown) -> str:
    return UNKNOWN if isinstance(value, Unknown) else "yes" if value else "no"


def _styled(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
