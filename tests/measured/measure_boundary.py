"""Hold predicted OOM boundaries against a GPU: 1.5 % below a run must fail, 1.5 % above it must pass.

usage: measure_boundary.py PREDICTED.jsonl OUT.jsonl [--workers N] [--deadline S] [--refine MIB]

Each run is a fresh process with its own CUDA context and cap. With `--refine` the boundary of every case is
then bisected to so many MiB, as long as the deadline allows. A row of OUT is the case with `fails_at_mib` and
`passes_at_mib` (null where no cap did), every run, and whether both first runs ended as predicted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import sys
import time
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counting devices must not make a context before the fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import trainer_run

MIB = 1 << 20
MARGIN = 0.015
SLOWEST_RUN_S = 90


class Search:
    """The caps that a case was run under, and the next to try."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        predicted = case["predicted_boundary_bytes"]
        self.pending = [round(predicted * (1 - MARGIN)), round(predicted * (1 + MARGIN))]
        self.below, self.above = self.pending
        self.runs: list[dict[str, Any]] = []

    def caps(self, status: str) -> list[int]:
        """Those that ended so."""
        return [run["cap_bytes"] for run in self.runs if run["status"] == status]

    @property
    def fails(self) -> int | None:
        """The largest cap that ran out of memory."""
        return max(self.caps("oom"), default=None)

    @property
    def passes(self) -> int | None:
        """The least cap that a run passed under."""
        return min(self.caps("ok"), default=None)

    def next_cap(self, refine_bytes: int) -> int | None:
        """The next cap to run under; None where nothing is left to learn."""
        if self.pending:
            return self.pending.pop(0)
        fails, passes = self.fails, self.passes
        if not refine_bytes or len(self.runs) < 2 or any(run["status"] == "error" for run in self.runs):
            return None
        if fails is None or passes is None:  # outside the margin: look further that way
            width = (self.above - self.below) * len(self.runs)
            return self.below - width if fails is None else self.above + width
        return (fails + passes) // 2 if passes - fails > refine_bytes else None

    def row(self) -> dict[str, Any]:
        """The case with what was measured."""
        ends = {run["cap_bytes"]: run["status"] for run in self.runs}
        return self.case | {
            "steps": trainer_run.STEPS,
            "fails_at_mib": None if self.fails is None else self.fails / MIB,
            "passes_at_mib": None if self.passes is None else self.passes / MIB,
            "is_as_predicted": ends.get(self.below) == "oom" and ends.get(self.above) == "ok",
            "gpu": self.runs[0].get("gpu"),
            "total_bytes": self.runs[0].get("total_bytes"),
            "versions": versions(),
            "runs": self.runs,
        }


def main() -> int:
    """Run all cases; 1 if some run did not end as predicted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--deadline", type=float, default=420)
    parser.add_argument("--refine", type=int, default=0, metavar="MIB")
    arguments = parser.parse_args()
    began = time.time()
    searches = [Search(json.loads(line)) for line in arguments.cases.read_text().splitlines()]
    preload(searches)
    print(f"imported in {time.time() - began:.0f} s", versions(), flush=True)
    run_all(searches, arguments.workers, arguments.refine * MIB, began + arguments.deadline)
    rows = [search.row() for search in searches if search.runs]
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = sum(row["is_as_predicted"] for row in rows)
    print(f"{good} of {len(searches)} as predicted, {time.time() - began:.0f} s")
    return 0 if good == len(searches) else 1


def preload(searches: list[Search]) -> None:
    """Import everything once, without touching CUDA, so that each forked run starts at once."""
    import torch

    real = torch.cuda.get_device_capability, torch.cuda._lazy_init

    def refuse() -> None:
        raise RuntimeError("CUDA must not start before the fork")

    torch.cuda.get_device_capability, torch.cuda._lazy_init = (lambda *_: (9, 0)), refuse
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        Trainer,
        TrainingArguments,
    )

    torch.cuda.get_device_capability, torch.cuda._lazy_init = real
    for search in searches:
        if trainer_run.needs_checkpoint(search.case):
            trainer_run.sparse_checkpoint(search.case["model"])


def run_all(searches: list[Search], workers: int, refine_bytes: int, deadline: float) -> None:
    """Keep `workers` runs going, one a case, until nothing is left or the time is up."""
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    running: dict[str, tuple[Any, Search, int]] = {}
    while True:
        for search in sorted(searches, key=lambda search: len(search.runs)):
            name = search.case["id"]
            if len(running) >= workers or name in running or time.time() > deadline:
                continue
            cap = search.next_cap(refine_bytes)
            if cap is not None:
                process = context.Process(target=trainer_run.run, args=(search.case, cap, results))
                process.start()
                running[name] = process, search, cap
        if not running:
            return
        collect(running, results, deadline)


def collect(running: dict[str, tuple[Any, Search, int]], results: Any, deadline: float) -> None:
    """Take what the runs report; a run that died or hangs has failed."""
    try:
        name, report = results.get(timeout=0.2)
    except queue.Empty:
        lost = time.time() > deadline + SLOWEST_RUN_S
        for name, (process, search, cap) in list(running.items()):
            if lost or (not process.is_alive() and results.empty()):
                process.kill()
                search.runs.append({"cap_bytes": cap, "status": "error", "error": "the process died"})
                del running[name]
        return
    process, search, _ = running.pop(name)
    process.join(20)
    if process.is_alive():
        process.kill()
    search.runs.append(report)
    off = report["cap_bytes"] / search.case["predicted_boundary_bytes"] - 1
    print(
        f"{off:+.2%} {report['status']:5} at {report.get('reached')} {report['seconds']} s {name}", flush=True
    )
    if report["status"] == "error":
        print(report["error"][-700:], flush=True)


def versions() -> dict[str, str]:
    """Versions of the libraries whose code ran."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "accelerate", "peft", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    sys.exit(main())
