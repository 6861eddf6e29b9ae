"""How well `memplan diagnose` reads labelled texts: `python benchmarks/diagnose.py CORPUS.jsonl`.

A line of the corpus is `{"text": …, "labels": {…}, "cause_ambiguous": …}`. Of several events the labels
describe the first. Printed a field: how many texts state it, how many are read exactly, and how many of those
that don't state it get a value all the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memplan.diagnosis.parse import diagnose

SIZES = (
    "requested_bytes", "total_bytes", "free_bytes", "allocated_bytes", "reserved_bytes",
    "reserved_unallocated_bytes", "process_bytes", "other_process_bytes",
)  # fmt: skip
NUMBERS = (*SIZES, "gpu", "rank")
NOTHING: Mapping[str, Any] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--misses", help="print the texts on which this field is wrong")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.corpus.read_text(encoding="utf-8").splitlines()]
    started = time.perf_counter()
    answers = [diagnose(row["text"]).to_dict() for row in rows]
    seconds = time.perf_counter() - started
    pairs = list(zip(rows, answers, strict=True))
    print(f"{len(rows)} texts, {seconds / len(rows) * 1000:.1f} ms a text")
    print(_line("kind", *_counted(pairs, lambda label: True, "kind")))
    for name in NUMBERS:
        right, stated = _counted(pairs, lambda label, n=name: label[n] is not None, name)
        invented = sum(
            _first(answer).get(name) is not None for row, answer in pairs if row["labels"][name] is None
        )
        print(_line(name, right, stated) + f"   invented {invented} of {len(rows) - stated}")
    print(_line("phase of the known", *_counted(pairs, lambda label: label["phase"] != "unknown", "phase")))
    clear = [pair for pair in pairs if not pair[0].get("cause_ambiguous")]
    print(_line("cause of the unambiguous", *_counted(clear, lambda label: True, "cause")))
    print(
        _line("n_ooms", sum(row["labels"]["n_ooms"] == answer["n_ooms"] for row, answer in pairs), len(pairs))
    )
    if arguments.misses:
        _show_misses(pairs, arguments.misses)


def _first(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return answer["events"][0] if answer["events"] else NOTHING


def _counted(pairs: Sequence[tuple[Any, Any]], counts: Any, name: str) -> tuple[int, int]:
    chosen = [(row["labels"], _first(answer)) for row, answer in pairs if counts(row["labels"])]
    return sum(label[name] == event.get(name) for label, event in chosen), len(chosen)


def _line(name: str, right: int, count: int) -> str:
    share = f"{right / count:6.1%}" if count else "     –"
    return f"{name:28} {share}  {right:3} of {count:3}"


def _show_misses(pairs: Sequence[tuple[Any, Any]], name: str) -> None:
    for row, answer in pairs:
        label, event = row["labels"], _first(answer)
        if label[name] != (answer[name] if name == "n_ooms" else event.get(name)):
            print(
                f"\n=== {row['id']} {name}: label {label[name]}, read {event.get(name)}; {event.get('kind')}"
            )
            print(row["text"][-1200:])


if __name__ == "__main__":
    main()
