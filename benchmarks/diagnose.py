"""How well `memplan.diagnose` reads a corpus of labelled texts: `python benchmarks/diagnose.py CORPUS.jsonl`."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from memplan.diagnosis import diagnose

SIZES = (
    "requested_bytes", "total_bytes", "free_bytes", "allocated_bytes", "reserved_bytes",
    "reserved_unallocated_bytes", "process_bytes", "other_process_bytes",
)  # fmt: skip
NUMBERS = ("gpu", "rank", *SIZES)


def answer(text: str) -> dict[str, Any]:
    """The first event and the count, under the labels' names."""
    found = diagnose(text)
    if not found.events:
        return {"kind": None, "phase": "unknown", "cause": "unknown", "n_ooms": 0, **dict.fromkeys(NUMBERS)}
    event = found.events[0]
    sizes = {name: getattr(event.figures, name) for name in ("gpu", *SIZES)}
    return {
        "kind": event.kind, "framework": event.framework, "phase": event.phase, "cause": event.cause,
        "rank": event.rank, "n_ooms": found.n_ooms, **sizes,
    }  # fmt: skip


def score(rows: list[dict[str, Any]], *, verbose: bool) -> dict[str, tuple[int, int]]:
    """Right and asked, for each field; `invented X` counts the texts that don't state X."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()

    def count(name: str, is_right: bool, row: dict[str, Any], got: Any, wanted: Any) -> None:
        asked[name] += 1
        right[name] += is_right
        if verbose and not is_right:
            print(f"  {row['id']} {name}: {got!r}, not {wanted!r}")

    for row in rows:
        labels, got = row["labels"], answer(row["text"])
        for name in ("kind", "n_ooms"):
            count(name, got[name] == labels[name], row, got[name], labels[name])
        for name in NUMBERS:
            wanted = labels[name]
            field = name if wanted is not None else f"invented {name}"
            count(field, got[name] == wanted, row, got[name], wanted)
        if labels["phase"] != "unknown":
            count("phase", got["phase"] == labels["phase"], row, got["phase"], labels["phase"])
        if not row.get("cause_ambiguous"):
            count("cause", got["cause"] == labels["cause"], row, got["cause"], labels["cause"])
    return {name: (right[name], asked[name]) for name in sorted(asked)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--only", type=Path, help="a JSON list of ids to score")
    parser.add_argument("--without", type=Path, help="a JSON list of ids to leave out")
    parser.add_argument("--verbose", action="store_true", help="show each miss")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.corpus.read_text(encoding="utf-8").splitlines()]
    if given.only:
        rows = [row for row in rows if row["id"] in set(json.loads(given.only.read_text()))]
    if given.without:
        rows = [row for row in rows if row["id"] not in set(json.loads(given.without.read_text()))]
    started = time.perf_counter()
    figures = score(rows, verbose=given.verbose)
    took = time.perf_counter() - started
    for name, (right, asked) in figures.items():
        print(f"{name:38} {right:4} of {asked:4}  {right / asked:7.1%}")
    print(f"{len(rows)} texts, {1000 * took / len(rows):.1f} ms a text")


if __name__ == "__main__":
    main()
