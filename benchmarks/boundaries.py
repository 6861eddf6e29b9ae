"""Predict the boundaries of cases: `python benchmarks/boundaries.py CASES.jsonl OUT.jsonl`.

A case is a measured row without its measurements. OUT has the cases with `predicted_boundary_bytes` and its
range over the allocator's address layouts; tests/measured/measure_boundary.py holds them against a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rows import not_predicted, request_of

from memplan.plan import boundary


def main() -> None:
    """Predict case by case."""
    cases, out = map(Path, sys.argv[1:3])
    lines = []
    for case in map(json.loads, cases.read_text().splitlines()):
        why_not = not_predicted(case)
        if why_not:
            raise SystemExit(f"{case['id']}: {why_not}")
        found = boundary(request_of(case))
        row = case | {
            "predicted_boundary_bytes": found.passes_at_bytes,
            "predicted_range_bytes": found.range_bytes,
        }
        print(f"{found.passes_at_bytes / 2**30:8.3f} GiB  {case['id']}", flush=True)
        lines.append(json.dumps(row) + "\n")
    out.write_text("".join(lines))


if __name__ == "__main__":
    main()
