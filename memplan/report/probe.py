"""The cards of a machine as a person or a program reads them; laid out by hand, since it must be instant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

from memplan.gpus.links import Link
from memplan.gpus.nvml import Unknown, known
from memplan.gpus.probe import Probe, ProbedCard, remarks
from memplan.report.text import clean_line, to_ascii
from memplan.units import GIB, format_bytes

UNKNOWN = "unknown"
_BOLD, _DIM = "1", "2"
_HEAD = ("GPU", "CUDA", "", "total", "torch sees", "used", "free", "compute", "bf16", "fp8", "ECC")


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
    """What `--gpus` takes for the cards that can be seen, rounded down; `unknown` for a card without a size."""
    sizes = (known(card.torch_total_bytes) for card in probe.visible)
    return ",".join(UNKNOWN if size is None else f"{size * 100 // GIB / 100:.2f}GiB" for size in sizes)


def render_probe(probe: Probe, *, color: bool = False, plain: bool = False) -> str:
    """A table of the cards, then what stands beside it: processes, links, remarks."""
    lines = [_styled(f"Driver {_word(probe.driver)}, CUDA up to {_word(probe.cuda)}", _DIM, color)]
    lines += [
        _styled(f"{name}={clean_line(value)}", _DIM, color) for name, value in probe.environment.items()
    ]
    table = _columns([_HEAD, *(row for card in probe.cards for row in _rows(card))], left=(2,))
    lines += ["", _styled(table[0], _BOLD, color), *table[1:]]
    lines += _section("Identity", _columns(list(_identities(probe)), left=(0, 1, 2, 3)), color)
    lines += _section("Processes", _columns(list(_processes(probe)), left=(0, 2, 3)), color)
    lines += _section("Links", [_link(link) for link in probe.links], color)
    lines += _section("To know", list(_remarks(probe)), color)
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


def _rows(card: ProbedCard) -> Iterator[Sequence[str]]:
    for each in (card, *card.slices):
        torch_total = _size(each.torch_total_bytes)
        is_estimate = not each.torch_total_seen and torch_total != UNKNOWN
        yield (
            "" if each.index is None else str(each.index),
            "hidden" if each.ordinal is None else _word(each.ordinal),
            clean_line(_word(each.name)),
            _size(each.total_bytes),
            f"~{torch_total}" if is_estimate else torch_total,
            _size(each.used_bytes),
            _size(each.free_bytes),
            UNKNOWN
            if isinstance(each.compute_capability, Unknown)
            else "{}.{}".format(*each.compute_capability),
            _yes(each.bf16),
            _yes(each.fp8),
            _yes(each.ecc),
        )


def _identities(probe: Probe) -> Iterator[Sequence[str]]:
    for card in probe.cards:
        for each in (card, *card.slices):
            kind = known(each.virtualization)
            yield (
                _name(card, each),
                _word(each.uuid),
                _word(each.pci_bus_id),
                "MIG on" if each.mig else kind if kind not in (None, "none") else "",
            )


def _processes(probe: Probe) -> Iterator[Sequence[str]]:
    for card in probe.cards:
        for each in (card, *card.slices):
            if isinstance(each.processes, Unknown):
                yield _name(card, each), "", "", f"unknown: {each.processes.reason}", ""
                continue
            for process in each.processes:
                used, command = _size(process.used_bytes), clean_line(_word(process.command))
                yield _name(card, each), str(process.pid), clean_line(_word(process.user)), command, used
            hidden = known(each.hidden_bytes)
            if hidden and not each.slices:
                yield _name(card, each), "", "", "not seen from here", _size(hidden)


def _remarks(probe: Probe) -> Iterator[str]:
    for card in probe.cards:
        for each in (card, *card.slices):
            yield from (f"{_name(card, each)}: {remark}" for remark in remarks(each))
    shown = [each for card in probe.cards for each in (card, *card.slices)]
    if any(not each.torch_total_seen and known(each.torch_total_bytes) for each in shown):
        yield "~: estimated; the difference between the driver's total and torch's was not seen on this model"
    reasons = dict.fromkeys(each.ordinal.reason for each in shown if isinstance(each.ordinal, Unknown))
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
