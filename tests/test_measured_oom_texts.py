"""Texts made on a real card, labelled by how they were made (`tests/fixtures/make_oom_texts.py` and its like)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan.diagnosis.parse import diagnose
from memplan.units import GIB, KIB, MIB

TEXTS = Path(__file__).parent / "measured" / "oom_texts.jsonl"
ROWS = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
FIGURES = ("requested_bytes", "total_bytes", "free_bytes", "allocated_bytes", "reserved_unallocated_bytes")


def as_torch_prints(size: int) -> int:
    """The size after torch has rounded it to two decimals of its unit."""
    for unit in (GIB, MIB, KIB):
        if size > unit or (size == unit and unit is not KIB):
            return round(round(size / unit, 2) * unit)
    return size


def test_there_are_enough() -> None:
    assert len(ROWS) >= 40
    phases = {row["label"]["phase"] for row in ROWS}
    assert phases >= {"load", "forward", "loss", "backward", "optimizer", "eval", "generate", "save", "data"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_what_failed_is_read(row: dict[str, Any]) -> None:
    answer = diagnose(row["text"]).to_dict()
    assert answer["events"][0]["kind"] == row["label"]["kind"]
    for name in FIGURES:
        if (size := row["label"].get(name)) is not None and answer["events"][0][name] is not None:
            assert answer["events"][0][name] == as_torch_prints(size), name


def test_phases() -> None:
    """By construction; a library's wrapping may fail before the phase that a scenario is named for."""
    known = [row for row in ROWS if row["label"]["phase"] != "unknown"]
    right = sum(diagnose(row["text"]).events[0].phase == row["label"]["phase"] for row in known)
    assert right >= 0.9 * len(known)


def test_causes() -> None:
    """A cap shows as a cap, whatever else the scenario was made for."""
    wrong = []
    for row in ROWS:
        is_capped = " allowed; " in row["text"] or "user-supplied memory fraction" in row["text"]
        expected = {row["label"]["cause"]} | ({"config"} if is_capped else set())
        cause = diagnose(row["text"]).events[0].cause
        if cause not in expected:
            wrong.append((row["id"], cause))
    assert len(wrong) <= 0.1 * len(ROWS), wrong
