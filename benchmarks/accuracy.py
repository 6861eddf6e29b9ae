"""How far the predictions are from what was measured: `python benchmarks/accuracy.py ROWS.jsonl`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rows import Result, Row, is_boundary, predict

from memplan.units import GIB

_HEADER = (
    f"{'allocated GiB':^25} {'reserved GiB':^25}\n"
    f"{'predicted':>9} {'measured':>8} {'off':>7} {'predicted':>9} {'measured':>8} {'off':>7} {'s':>6}  row"
)
_BOUNDARY_HEADER = (
    f"{'boundary GiB':^28}\n{'predicted':>9} {'fails at':>8} {'passes at':>9} {'off':>7} {'s':>6}  row"
)


def main() -> None:
    """Predict every row, print each as it comes, and the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="measured rows, one JSON object a line")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results here as well")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--match", default="", metavar="PATTERN", help="only rows whose id contains this")
    arguments = parser.parse_args()

    lines = arguments.rows.read_text().splitlines()
    rows = [row for row in map(json.loads, filter(None, lines)) if arguments.match in row["id"]]
    print(_BOUNDARY_HEADER if rows and all(map(is_boundary, rows)) else _HEADER)
    results = []
    for result in predict_all(rows, arguments.jobs):
        print(line_of(result), flush=True)
        results.append(result)
    summary = summarize(results)
    print("\n" + text_of(summary))
    if arguments.json:
        report = {"rows": [asdict(result) for result in results], "summary": summary}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def predict_all(rows: Sequence[Row], jobs: int) -> Iterator[Result]:
    """The results in the rows' order. A process that dies takes its pool along, and says so in the notes."""
    if jobs <= 1:
        yield from map(predict, rows)
        return
    # Not fork: torch's threads do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(predict, row) for row in rows]
        for row, future in zip(rows, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Result(id=row["id"], note="failed: a process of the pool died")


def line_of(result: Result) -> str:
    """One row of the table."""
    seconds = "-" if result.seconds is None else f"{result.seconds:.1f}"
    note = f"  [{result.note}]" if result.note else ""
    if result.measured_boundary_bytes is not None:
        fails, passes = map(_gib, result.measured_boundary_bytes)
        predicted, off = _gib(result.predicted_boundary_bytes), _percent(result.error_boundary)
        return f"{predicted:>9} {fails:>8} {passes:>9} {off:>7} {seconds:>6}  {result.id}{note}"
    figures = [
        f"{_gib(predicted):>9} {_gib(measured):>8} {_percent(error):>7}"
        for predicted, measured, error in (
            (result.predicted_allocated_bytes, result.measured_allocated_bytes, result.error_allocated),
            (result.predicted_reserved_bytes, result.measured_reserved_bytes, result.error_reserved),
        )
    ]
    return f"{figures[0]} {figures[1]} {seconds:>6}  {result.id}{note}"


def _gib(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / GIB:.3f}"


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.2%}"


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Counts, and of the errors' sizes the mean, median and largest; `most_under` is the lowest error."""
    return {
        "rows": len(results),
        "predicted": sum(map(_is_predicted, results)),
        "allocated": _spread(result.error_allocated for result in results),
        "reserved": _spread(result.error_reserved for result in results),
        "boundary": _spread(result.error_boundary for result in results),
        "seconds": round(sum(result.seconds or 0 for result in results), 3),
    }


def _is_predicted(result: Result) -> bool:
    return result.predicted_allocated_bytes is not None or result.predicted_boundary_bytes is not None


def _spread(errors: Iterable[float | None]) -> dict[str, Any]:
    known = [error for error in errors if error is not None]
    if not known:
        return {"count": 0, "mean": None, "median": None, "max": None, "most_under": None}
    sizes = [abs(error) for error in known]
    return {
        "count": len(known),
        "mean": statistics.fmean(sizes),
        "median": statistics.median(sizes),
        "max": max(sizes),
        "most_under": min(known),
    }


def text_of(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    lines = [f"{summary['predicted']} of {summary['rows']} rows predicted in {summary['seconds']:.0f} s"]
    for name in ("allocated", "reserved", "boundary"):
        spread = summary[name]
        if spread["count"]:
            lines.append(
                f"{name:9} ({spread['count']} rows): off by {spread['mean']:.3%} on average, "
                f"median {spread['median']:.4%}, at most {spread['max']:.2%}; "
                f"most under {spread['most_under']:+.2%}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
