"""The OOM boundary: by replay, against measured caps, and the search that measures new ones on a GPU."""

from __future__ import annotations

import json
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.allocator import LAYOUTS, AllocConf, replay
from memplan.plan.limits import GRAIN_BYTES, boundary_bytes, boundary_of, passes_under
from memplan.timeline import Kind, Phase, Timeline
from memplan.units import MIB

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "tests" / "measured"
sys.path[:0] = [str(ROOT / "benchmarks"), str(MEASURED)]

import measure_boundary  # noqa: E402
import rows  # noqa: E402
import trainer_run  # noqa: E402

BOUNDARIES = [json.loads(line) for line in (MEASURED / "boundary.jsonl").read_text().splitlines()]
PREDICTED = [json.loads(line) for line in (MEASURED / "boundary_predicted.jsonl").read_text().splitlines()]


def timeline(steps: list[int]) -> Timeline:
    """Positive numbers allocate so many bytes, others free the live storage that they index."""
    made = Timeline(phases=[Phase("forward", 0)], operators=["aten::empty"], modules=[""])
    live: list[tuple[int, int]] = []
    for number, step in enumerate(steps):
        if step > 0:
            live.append((number, step))
            made.kind.append(Kind.ALLOC)
        elif live:
            made.kind.append(Kind.FREE)
        else:
            continue
        storage, size_bytes = live[-1] if step > 0 else live.pop(step % len(live))
        made.storage.append(storage)
        made.size_bytes.append(size_bytes)
        for column in (made.phase, made.operator, made.module, made.stream):
            column.append(0)
    made.category = array("b", bytes(len(steps)))
    return made


STEPS = st.lists(st.integers(-9, 0) | st.integers(1, 60 * MIB), max_size=60)
CONFS = st.sampled_from(
    [AllocConf(), AllocConf(expandable_segments=True), AllocConf(max_split_size_bytes=24 * MIB)]
)


@settings(max_examples=150, deadline=None)
@given(STEPS, CONFS, st.sampled_from(LAYOUTS))
def test_it_passes_at_the_boundary_and_fails_below(steps: list[int], conf: AllocConf, layout: Any) -> None:
    made = timeline(steps)
    found = boundary_bytes(made, conf, layout=layout)
    assert found % GRAIN_BYTES == 0
    assert passes_under(made, found, conf, layout)
    assert found == 0 or not passes_under(made, found - 1, conf, layout)
    uncapped = replay(made, conf=conf, layout=layout)
    assert found <= -(-uncapped.peak_reserved_bytes // GRAIN_BYTES) * GRAIN_BYTES


def test_cached_memory_is_given_back_before_a_job_fails() -> None:
    made = timeline([40 * MIB, 0, 44 * MIB])
    assert replay(made).peak_reserved_bytes == 84 * MIB
    assert boundary_of(made).passes_at_bytes == 44 * MIB
    assert boundary_of(made).range_bytes == (44 * MIB, 44 * MIB)


def test_fragments_put_it_above_what_is_allocated() -> None:
    steps = [11 * MIB, 11 * MIB, -8, 13 * MIB]  # the first block is freed: 13 MiB don't go into it
    assert boundary_of(timeline(steps)).passes_at_bytes == 26 * MIB
    joined = [6 * MIB, 6 * MIB, 6 * MIB, -9, -8, 8 * MIB]
    assert boundary_of(timeline(joined)).passes_at_bytes == 20 * MIB


@pytest.mark.parametrize(("predicted", "error"), [(98, -0.02), (100, 0), (104, 0), (110, 0), (121, 0.1)])
def test_the_distance_is_to_the_nearer_end(predicted: int, error: float) -> None:
    assert rows.distance(predicted, 100, 110) == pytest.approx(error)


@pytest.mark.parametrize("case", ["gpt2_full_bf16_b2_s1024_gc", "qwen2.5-0.5b_full_bf16_b2_s1024_gc"])
def test_a_measured_boundary_is_predicted_within_one_percent(case: str) -> None:
    row = next(row for row in BOUNDARIES if row["id"] == case)
    result = rows.predict(row)
    assert result.note is None
    assert result.predicted_boundary_bytes is not None
    assert result.error_boundary is not None and abs(result.error_boundary) < 0.01
    assert result.measured_boundary_bytes == (
        round(row["fails_at_mib"] * MIB),
        round(row["passes_at_mib"] * MIB),
    )


def test_the_predicted_cases_are_ones_that_a_request_describes_and_none_that_was_measured() -> None:
    measured = {
        json.loads(line)["id"]
        for name in ("boundary.jsonl", "steps.jsonl")
        for line in (MEASURED / name).read_text().splitlines()
    }
    assert len(PREDICTED) == 10 and not measured & {case["id"] for case in PREDICTED}
    assert {case["method"] for case in PREDICTED} == {"full", "lora", "qlora"}
    assert {case["grad_ckpt"] for case in PREDICTED} == {True, False}
    assert "expandable_segments:True" in {case.get("alloc_conf") for case in PREDICTED}
    for case in PREDICTED:
        assert case["model"] in trainer_run.CONFIGS
        assert rows.not_predicted(case) is None
        least, most = case["predicted_range_bytes"]
        assert least <= case["predicted_boundary_bytes"] <= most


def searched(truth: float, refine_bytes: int) -> measure_boundary.Search:
    """A search over a card on which a case passes from `truth` bytes on."""
    search = measure_boundary.Search({"id": "x", "predicted_boundary_bytes": 1000 * MIB})
    while (cap := search.next_cap(refine_bytes)) is not None:
        search.runs.append({"cap_bytes": cap, "status": "ok" if cap >= truth else "oom"})
        assert len(search.runs) < 30
    return search


@pytest.mark.parametrize(
    ("truth_mib", "is_as_predicted"), [(1000, True), (990, True), (950, False), (1200, False)]
)
def test_a_search_closes_in_on_the_boundary_from_either_side(truth_mib: int, is_as_predicted: bool) -> None:
    search = searched(truth_mib * MIB, 8 * MIB)
    assert search.fails is not None and search.passes is not None
    assert search.fails < truth_mib * MIB <= search.passes <= search.fails + 8 * MIB
    row = search.row()
    assert row["is_as_predicted"] is is_as_predicted
    assert rows.is_boundary(row) and row["fails_at_mib"] < truth_mib <= row["passes_at_mib"]


def test_two_runs_are_enough_without_refining_and_an_error_ends_it() -> None:
    assert [run["cap_bytes"] for run in searched(1000 * MIB, 0).runs] == [985 * MIB, 1015 * MIB]
    search = searched(1000 * MIB, 0)
    search.runs[0]["status"] = "error"
    assert search.next_cap(8 * MIB) is None
    assert search.row()["is_as_predicted"] is False
