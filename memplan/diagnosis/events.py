"""From a stream's text to findings: where a wording stands, how far its message reaches, what repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from memplan.diagnosis.figures import BEFORE, read_figures
from memplan.diagnosis.frames import frames_of
from memplan.diagnosis.lines import Stream
from memplan.diagnosis.types import NOT_OOM, Figures, Finding
from memplan.diagnosis.wordings import Wording, compiled, wordings

_LONGEST_MESSAGE = 1600
_AROUND = 500
_SAME_MESSAGE = 6
"""Lines within which a mention without figures belongs to the message before it."""
_MOST_HITS = 400
"""Of one stream: a text that repeats one error without end says nothing new after that."""


@dataclass(frozen=True, slots=True)
class _Hit:
    start: int
    end: int
    order: int
    wording: Wording


def findings_of(stream: Stream) -> list[Finding]:
    """What the stream reports, each mention by itself, in its order."""
    hits = _hits(stream.lower)
    findings = []
    for i, hit in enumerate(hits):
        floor = hits[i - 1].end if i else 0
        ceiling = hits[i + 1].start if i + 1 < len(hits) else len(stream.flat)
        findings.append(_finding(stream, hit, floor, ceiling))
    return findings


def merged(findings: Sequence[Finding]) -> list[tuple[Finding, int]]:
    """Findings of different failures, in the order of the text, and how often each is told again."""
    distinct: list[tuple[Finding, int]] = []
    for finding in sorted(findings, key=lambda finding: finding.line):
        for i in range(len(distinct) - 1, max(-1, len(distinct) - 65), -1):
            known, echoes = distinct[i]
            if _is_same(known, finding):
                is_the_same_message = finding.line - known.line < _SAME_MESSAGE and finding.figures.is_empty
                distinct[i] = (_united(known, finding), echoes + (not is_the_same_message))
                break
        else:
            distinct.append((finding, 0))
    return _without_consequences(distinct)


def _hits(text: str) -> list[_Hit]:
    found = [
        _Hit(match.start(), match.end(), order, wording)
        for order, wording in enumerate(wordings())
        if wording.needle in text
        for match, _ in zip(compiled(wording.pattern).finditer(text), range(_MOST_HITS), strict=False)
    ]
    found.sort(key=lambda hit: (hit.start, hit.wording.is_weak, hit.order))
    strong: list[_Hit] = []
    for hit in found:
        if not hit.wording.is_weak and (not strong or hit.start >= strong[-1].end):
            strong.append(hit)
    kept = strong + _lone_weak([hit for hit in found if hit.wording.is_weak], strong)
    return sorted(kept, key=lambda hit: hit.start)[:_MOST_HITS]


def _lone_weak(weak: Sequence[_Hit], strong: Sequence[_Hit]) -> list[_Hit]:
    """Weak wordings that stand by themselves: no full message near, no other weak one just before."""
    lone: list[_Hit] = []
    at = 0
    for hit in weak:
        while at < len(strong) and strong[at].start < hit.start:
            at += 1
        before = [other for other in strong[max(0, at - 3) : at] if _covers(other, hit)]
        after = [other for other in strong[at : at + 1] if other.start - hit.end < 200]
        same = [o for o in lone[-2:] if o.wording.kind == hit.wording.kind and hit.start - o.end < 600]
        if not before and not after and not same:
            lone.append(hit)
    return lone


def _covers(strong: _Hit, weak: _Hit) -> bool:
    reach = _LONGEST_MESSAGE if strong.wording.kind == weak.wording.kind else 100
    return weak.start - strong.end < reach


def _finding(stream: Stream, hit: _Hit, floor: int, ceiling: int) -> Finding:
    kind = hit.wording.kind
    start = max(floor, hit.start - (300 if hit.wording.is_weak else BEFORE.get(kind, 0)))
    end = min(ceiling, hit.start + _LONGEST_MESSAGE)
    index = stream.index_at(hit.start)
    line = stream.lines[index]
    since = stream.lines[stream.index_at(floor)].number if floor else 0
    return Finding(
        kind=kind,
        framework=hit.wording.framework,
        line=line.number,
        message=stream.flat[hit.start : end],
        around=stream.flat[max(0, hit.start - _AROUND) : hit.start + _LONGEST_MESSAGE],
        rank=line.rank if line.rank is not None else _stated_rank(stream.lower[hit.start : end]),
        figures=read_figures(kind, stream.lower[start:end]),
        frames=frames_of(stream, index, since),
    )


def _stated_rank(message: str) -> int | None:
    """The rank that a launcher's report names: `rank : 3 (local_rank: 1)`, `local_rank: 0 (pid: 192)`."""
    match = compiled(r"\b(?:local_)?rank {0,8}: ?(\d{1,5})\b").search(message, 0, 240)
    return int(match[1]) if match else None


def _is_same(known: Finding, other: Finding) -> bool:
    """Whether two mentions may be of one failure: nothing in them contradicts it, and something ties them."""
    if known.kind != other.kind:
        return False
    if known.rank is not None and other.rank is not None and known.rank != other.rank:
        return False
    pairs = [
        (getattr(known.figures, field.name), getattr(other.figures, field.name)) for field in fields(Figures)
    ]
    stated = [(a, b) for a, b in pairs if a is not None and b is not None]
    if any(a != b for a, b in stated):
        return False
    return (
        bool(stated)
        or known.figures.is_empty
        or other.figures.is_empty
        or other.line - known.line < _SAME_MESSAGE
    )


def _united(first: Finding, again: Finding) -> Finding:
    values = {
        field.name: value
        if (value := getattr(first.figures, field.name)) is not None
        else getattr(again.figures, field.name)
        for field in fields(Figures)
    }
    return replace(
        first,
        figures=Figures(**values),
        rank=again.rank if first.rank is None else first.rank,
        frames=first.frames or again.frames,
        message=first.message if len(first.message) > 40 else again.message,
    )


def _without_consequences(distinct: list[tuple[Finding, int]]) -> list[tuple[Finding, int]]:
    """What only follows from an earlier failure is counted with the first, not listed."""
    if any(finding.kind not in NOT_OOM and not finding.figures.is_empty for finding, _ in distinct):
        # a full message stands for itself; one without figures may only echo a broken context
        distinct = [pair for pair in distinct if pair[0].kind not in NOT_OOM]
    kept: list[tuple[Finding, int]] = []
    for finding, echoes in distinct:
        first = kept[0][0] if kept else None
        is_consequence = first is not None and (
            finding.kind in NOT_OOM
            or (
                first.kind not in NOT_OOM
                and first.kind != "host_oom"
                and finding.kind == "host_oom"
                and finding.figures.is_empty
            )
        )
        if is_consequence and first is not None and first.kind != finding.kind:
            kept[0] = (kept[0][0], kept[0][1] + 1)
        else:
            kept.append((finding, echoes))
    return kept
