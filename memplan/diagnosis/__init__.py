"""From a pasted text to what happened and what to change. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import replace

from memplan.diagnosis.causes import cause_of
from memplan.diagnosis.events import events_of
from memplan.diagnosis.phases import phase_of
from memplan.diagnosis.reading import Reading, plain
from memplan.diagnosis.types import NOT_MEMORY, Diagnosis, Event

_LINES_BEFORE, _LINES_AFTER = 1000, 8


def diagnose(text: str) -> Diagnosis:
    """What a pasted text says of running out of memory."""
    reading = Reading(plain(text))
    events = [_understood(event, reading) for event in events_of(reading)]
    ordered = sorted(events, key=lambda event: event.kind in NOT_MEMORY)
    return Diagnosis(
        events=tuple(ordered),
        compat=(),
        n_ooms=sum(event.kind not in NOT_MEMORY for event in events),
        lines=len(reading.lines),
    )


def _understood(event: Event, reading: Reading) -> Event:
    line = event.line - reading.first_line
    before = reading.before(line, _LINES_BEFORE, reading.rank_of(line))
    after = reading.flat_lines[line + 1 : line + 1 + _LINES_AFTER]
    told = phase_of(event, before, after)
    around = "\n".join([*before[-10:], event.message, *after])[:4000]
    cause, evidence = cause_of(replace(event, phase=told.phase), around)
    said = (told.evidence,) if told.evidence else ()
    return replace(event, phase=told.phase, cause=cause, evidence=(*evidence, *said))
