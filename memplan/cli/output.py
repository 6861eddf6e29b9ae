"""The one sink: data to stdout, everything else to stderr, in the format that was asked for."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast, get_args

from memplan.errors import MemplanError

if TYPE_CHECKING:
    from memplan.diagnosis.doctor import Health
    from memplan.diagnosis.types import Diagnosis
    from memplan.estimate import Plan
    from memplan.gpus.probe import Probe

Format = Literal["auto", "human", "json", "quiet"]
FORMATS: tuple[str, ...] = get_args(Format)
_WIDEST = 100
_WIDTH_OF_A_PIPE = 80


def format_asked_for(arguments: Sequence[str]) -> Format:
    """The `--format` among the arguments, before they are parsed: errors of parsing are shown in it too."""
    chosen = "auto"
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument == "--":
            break
        if argument == "--format" and following in FORMATS:
            chosen = following
        elif argument.startswith("--format=") and argument.removeprefix("--format=") in FORMATS:
            chosen = argument.removeprefix("--format=")
    return cast(Format, chosen)


@dataclass
class Output:
    """Where a verb's answer goes. `auto` is for a person: programs ask for `json`."""

    format: Format = "auto"
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)
    indent: int | None = 2
    """Of JSON; None puts a document on one line, where several follow each other."""

    def plan(self, plan: Plan) -> None:
        """The answer of `check`."""
        if self.format == "quiet":
            self._data(plan.verdict)
        elif self.format == "json":
            from memplan.report.json import plan_to_dict

            self._json(plan_to_dict(plan))
        else:
            from memplan.report.terminal import render_plan

            self._data(render_plan(plan, **self._look()))
            for hint in plan.hints:
                self.remark("hint", hint)

    def diagnosis(self, diagnosis: Diagnosis) -> None:
        """The answer of `diagnose`."""
        if self.format == "quiet":
            first = diagnosis.events[0] if diagnosis.events else None
            self._data(f"{first.kind} {first.phase} {first.cause}" if first else "nothing recognised")
        elif self.format == "json":
            self._json(diagnosis.to_dict())
        else:
            from memplan.report.diagnosis import render_diagnosis

            self._data(render_diagnosis(diagnosis, **self._look()))

    def health(self, health: Health) -> None:
        """The answer of `doctor`."""
        if self.format == "quiet":
            self._data(str(len(health.problems)))
        elif self.format == "json":
            self._json(health.to_dict())
        else:
            from memplan.report.diagnosis import render_health

            self._data(render_health(health, **self._look()))

    def probe(self, probe: Probe) -> None:
        """The answer of `probe`; quiet is what `--gpus` takes for the cards that can be seen."""
        from memplan.report.probe import probe_to_dict, probe_to_gpus, render_probe

        if self.format == "quiet":
            self._data(probe_to_gpus(probe))
        elif self.format == "json":
            self._json(probe_to_dict(probe))
        else:
            self._data(render_probe(probe, **self._look()))

    def redraw(self) -> None:
        """Begin again at the top of a terminal; elsewhere one answer follows the other."""
        if self.format in ("auto", "human"):
            _write(self.stdout, "\x1b[H\x1b[2J" if self.stdout.isatty() else "\n")

    def error(self, error: MemplanError) -> None:
        """An error: JSON where a program reads, else text on stderr."""
        if self.format == "json":
            self._json({"error": error.to_dict()})
            return
        from memplan.report.error import render_error
        from memplan.report.text import is_plain, wants_color

        width = _width(self.stderr) if self.stderr.isatty() else None
        color, plain = wants_color(self.stderr), is_plain(self.stderr)
        _write(self.stderr, render_error(error, color=color, plain=plain, width=width) + "\n")

    def remark(self, label: str, text: str) -> None:
        """A hint or a warning for a person; a program finds it in the JSON."""
        if self.format in ("json", "quiet"):
            return
        from memplan.report.error import render_remark
        from memplan.report.text import is_plain, wants_color

        line = render_remark(label, text, color=wants_color(self.stderr), plain=is_plain(self.stderr))
        _write(self.stderr, line + "\n")

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """A line that stands while something takes its seconds; only where it can be taken away again."""
        from memplan.report.text import clean_line

        is_shown = (
            self.format in ("auto", "human") and self.stderr.isatty() and os.environ.get("TERM") != "dumb"
        )
        if is_shown:
            _write(self.stderr, clean_line(text)[: _width(self.stderr) - 1] + "\r")
        try:
            yield
        finally:
            if is_shown:
                _write(self.stderr, "\x1b[2K\r")

    def _look(self) -> dict[str, Any]:
        """Width, colour and characters that stdout takes."""
        from memplan.report.text import is_plain, wants_color

        return {
            "width": _width(self.stdout),
            "color": wants_color(self.stdout),
            "plain": is_plain(self.stdout),
        }

    def _json(self, document: dict[str, Any]) -> None:
        self._data(json.dumps(document, indent=self.indent, allow_nan=False))

    def _data(self, text: str) -> None:
        _write(self.stdout, text + "\n")


def _write(stream: TextIO, text: str) -> None:
    """Write at once. A reader that has gone away, as `head` does, is no error of ours."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _width(stream: TextIO) -> int:
    if not stream.isatty() and "COLUMNS" not in os.environ:
        return _WIDTH_OF_A_PIPE
    return min(shutil.get_terminal_size((_WIDTH_OF_A_PIPE, 24)).columns, _WIDEST)
