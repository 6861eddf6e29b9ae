"""From a plain text to its events: each message found once, in order, with its figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from memplan.diagnosis import figures
from memplan.diagnosis.reading import Reading
from memplan.diagnosis.types import Event, Figures
from memplan.diagnosis.wordings import WORDINGS, Wording

MOST_EVENTS = 100
"""Read in full; a text with more repeats itself."""
_BEFORE, _AFTER, _AROUND = 300, 2500, 2000
_NEAR = 400
_END = re.compile(r"\n[^\n]{0,3}\s{0,80}\n|Traceback \(most recent call last\)|\n```|\n~~~")
_SAME_MOMENT = 20
_GENERAL = {"cuda_oom", "cuda_error_oom"}
"""Without figures these may be another's message, mentioned."""
_WIDE = {"limit", "ray", "kernel"}
_SIZES = tuple(field.name for field in fields(Figures))
_RANKS = (
    re.compile(r"\blocal_rank ?[:=] ?(\d{1,5})\b"),
    re.compile(r"\brank[ =:]{1,3}(\d{1,5})\b[^\n]{0,60}\(local_rank"),
    re.compile(r"\b[Rr]ank ?[:=#]? ?(\d{1,5})\b"),
)


@dataclass(frozen=True)
class Found:
    """A wording at its place in the flat text."""

    start: int
    end: int
    row: int

    @property
    def wording(self) -> Wording:
        """The table's row."""
        return WORDINGS[self.row]


def events_of(reading: Reading) -> list[Event]:
    """The events, in the order of the text, echoes left out."""
    found = _grouped(reading.flat, sorted(_matches(reading.flat), key=lambda f: (f.start, f.row)))
    bounds = [group[0].start for group in found]
    events = []
    for index, group in enumerate(found[:MOST_EVENTS]):
        following = bounds[index + 1] if index + 1 < len(found) else len(reading.flat)
        preceding = max(one.end for one in found[index - 1]) if index else 0
        events.append(_event(reading, group, preceding, following))
    return _distinct(events)


def _matches(text: str) -> Iterator[Found]:
    for row, wording in enumerate(WORDINGS):
        for count, match in enumerate(wording.pattern.finditer(text)):
            if count >= MOST_EVENTS:
                break
            yield Found(match.start(), match.end(), row)


def _grouped(text: str, found: list[Found]) -> list[list[Found]]:
    """Wordings that stand in one message, together."""
    groups: list[list[Found]] = []
    for one in found:
        if groups and _belongs(text, groups[-1], one):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _belongs(text: str, group: list[Found], one: Found) -> bool:
    last = group[-1]
    if one.start < last.end:
        return True
    if _family(one) != _family(group[0]) or one.start - last.end > _NEAR:
        return False
    if one.wording.kind != last.wording.kind and "\n" in text[last.end : one.start]:
        return False
    return one.row != last.row and all(one.row != other.row for other in group)


def _family(found: Found) -> str:
    kind = found.wording.kind
    if kind in ("host_oom", "shm"):
        return "host"
    return "other" if kind in ("not_oom", "load_dispatch", "compat") else "device"


def _event(reading: Reading, group: list[Found], preceding: int, following: int) -> Event:
    best = min(group, key=lambda found: found.row)
    message = _message(reading.flat, group, best, preceding, following)
    line = reading.line_at(best.start)
    read = figures.read(best.wording.family, message)
    return Event(
        kind=best.wording.kind,
        framework=best.wording.framework or "",
        figures=read,
        rank=_rank(reading, line, best),
        line=reading.first_line + line,
        message=message,
    )


def _message(text: str, group: list[Found], best: Found, preceding: int, following: int) -> str:
    """The message's own words on one line, from the start of its line to where it ends."""
    start, end = min(one.start for one in group), max(one.end for one in group)
    if best.wording.family in _WIDE:
        piece = text[max(preceding, start - _AROUND) : end + _AROUND]
        return " ".join(piece.split())
    start = max(preceding, start - _BEFORE, text.rfind("\n", max(start - _BEFORE, 0), start) + 1)
    stop = min(following, end + _AFTER)
    ending = _END.search(text, end, stop)
    piece = text[start : ending.start() if ending else stop]
    return _unwrapped(piece)


def _unwrapped(piece: str) -> str:
    """The piece on one line; a terminal that broke it in the middle of words filled its lines equally."""
    lines = piece.split("\n")
    width = len(lines[0])
    if len(lines) > 2 and width >= 60 and all(len(line) == width for line in lines[:-1][:4]):
        return " ".join("".join(lines).split())
    return " ".join(piece.split())


def _rank(reading: Reading, line: int, best: Found) -> int | None:
    named = reading.rank_of(line)
    if named is not None:
        return named
    here = reading.flat_lines[line][:500]
    if best.wording.kind == "host_oom":
        here += " " + " ".join(reading.flat_lines[max(line - 3, 0) : line + 4])[:1500]
    for pattern in _RANKS:
        if (match := pattern.search(here)) is not None:
            return int(match[1])
    return None


def _stated(event: Event) -> dict[str, int]:
    return {
        name: value
        for name in _SIZES
        if name != "gpu" and (value := getattr(event.figures, name)) is not None
    }


def _distinct(events: list[Event]) -> list[Event]:
    """Without what repeats or merely mentions another: a logger prints an error twice, prose names it."""
    kept: list[Event] = []
    for event in events:
        twin = next((i for i, other in enumerate(kept) if _is_same(other, event)), None)
        if twin is None:
            kept.append(event)
        else:
            kept[twin] = _richer(kept[twin], event)
    return kept


def _is_same(one: Event, other: Event) -> bool:
    if _side(one) != _side(other):
        return False
    first, second = _stated(one), _stated(other)
    if first and second:
        shared = first.keys() & second.keys()
        agree = all(first[name] == second[name] for name in shared)
        return agree and bool(shared) and one.rank == other.rank and _compatible(one, other)
    bare = one if not first else other
    return _compatible(one, other) and (one.kind == other.kind or bare.kind in _GENERAL)


def _side(event: Event) -> str:
    if event.kind in ("host_oom", "shm"):
        return "host"
    return event.kind if event.kind in ("not_oom", "load_dispatch", "vllm_kv", "sglang_kv") else "device"


def _compatible(one: Event, other: Event) -> bool:
    gpus = {one.figures.gpu, other.figures.gpu} - {None}
    return len(gpus) < 2


def _richer(one: Event, other: Event) -> Event:
    """Of two views of one event, the one that states more; the earlier's place is kept."""
    if len(_stated(other)) > len(_stated(one)):
        rank = other.rank if other.rank is not None else one.rank
        return replace(other, rank=rank)
    return one
