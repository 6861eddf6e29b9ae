"""From text to a diagnosis."""

from __future__ import annotations

from memplan.diagnose.cause import cause_of
from memplan.diagnose.events import findings_of, merged
from memplan.diagnose.lines import split_lines, streams
from memplan.diagnose.phase import phase_of
from memplan.diagnose.types import NOT_OOM, Diagnosis, Event, Finding

_MOST_EVENTS = 200


def diagnose_rows(rows: list[tuple[int, str]], n_lines: int) -> Diagnosis:
    """The diagnosis of numbered lines."""
    findings = [finding for stream in streams(rows) for finding in findings_of(stream)]
    distinct = merged(findings)
    events = tuple(_event(finding, echoes) for finding, echoes in distinct[:_MOST_EVENTS])
    n_ooms = sum(finding.kind not in NOT_OOM for finding, _ in distinct)
    return Diagnosis(events=events, compat=(), n_ooms=n_ooms, n_lines=n_lines)


def diagnose(text: str) -> Diagnosis:
    """What a pasted text says happened, why, and what to change."""
    rows = split_lines(text)
    return diagnose_rows(rows, rows[-1][0] if rows else 0)


def _event(finding: Finding, echoes: int) -> Event:
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
        advice=(),
        line=finding.line,
        echoes=echoes,
    )
