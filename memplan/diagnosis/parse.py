"""From text to a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice

from memplan.diagnosis.cause import cause_of
from memplan.diagnosis.compat import Entry, found_in
from memplan.diagnosis.events import findings_of, merged
from memplan.diagnosis.fixes import advice_for
from memplan.diagnosis.frames import frames_of
from memplan.diagnosis.lines import Stream, split_lines, streams
from memplan.diagnosis.phase import phase_of
from memplan.diagnosis.tool import tool_of
from memplan.diagnosis.types import NOT_OOM, Advice, CompatMatch, Diagnosis, Event, Finding

_MOST_EVENTS = 200
_MOST_FINDINGS = 1000
"""A text that repeats errors without end says nothing new after that."""


def diagnose(text: str) -> Diagnosis:
    """What a pasted text says happened, why, and what to change."""
    return diagnose_rows(split_lines(text), text.count("\n") + bool(text))


def diagnose_rows(rows: Sequence[tuple[int, str]], n_lines: int) -> Diagnosis:
    """The same for numbered lines, which may leave some of a log out."""
    parts = streams(rows)
    findings = chain.from_iterable(findings_of(stream) for stream in parts)
    distinct = merged(list(islice(findings, _MOST_FINDINGS)))
    events = tuple(_event(finding, echoes) for finding, echoes in distinct[:_MOST_EVENTS])
    conflicts = [(entry, stream, offset) for stream in parts for entry, offset in found_in(stream)]
    if not events:
        events = tuple(_conflict(*conflict) for conflict in conflicts[:1] if conflict[0].level == "error")
    n_ooms = sum(finding.kind not in NOT_OOM for finding, _ in distinct)
    return Diagnosis(events=events, compat=_matches(conflicts), n_ooms=n_ooms, n_lines=n_lines)


def _event(finding: Finding, echoes: int) -> Event:
    finding = replace(finding, framework=tool_of(finding))
    phase, shown_by = phase_of(finding)
    cause, evidence = cause_of(finding, phase)
    if shown_by:
        evidence = (*evidence, f"phase: {shown_by}")
    return Event(
        kind=finding.kind,
        framework=finding.framework,
        figures=finding.figures,
        rank=finding.rank,
        phase=phase,
        cause=cause,
        evidence=evidence,
        advice=advice_for(finding, phase, cause),
        line=finding.line,
        echoes=echoes,
    )


def _conflict(entry: Entry, stream: Stream, offset: int) -> Event:
    """A known conflict as the event of a text that has no other."""
    index = stream.index_at(offset)
    line = stream.lines[index]
    finding = Finding(
        kind=entry.kind,
        framework="python",
        line=line.number,
        message=stream.flat[offset : offset + 300],
        around=stream.flat[max(0, offset - 500) : offset + 300],
        rank=line.rank,
        frames=frames_of(stream, index, 0),
    )
    event = _event(finding, 0)
    return replace(event, evidence=(entry.cause, *event.evidence), advice=(Advice(text=entry.fix),))


def _matches(conflicts: Sequence[tuple[Entry, Stream, int]]) -> tuple[CompatMatch, ...]:
    matches: dict[str, CompatMatch] = {}
    for entry, stream, offset in conflicts:
        matches.setdefault(entry.id, entry.match(stream.lines[stream.index_at(offset)].number))
    return tuple(matches.values())
