"""`memplan diagnose`: what does this out-of-memory text say, and what should change?"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any, BinaryIO

import click

from memplan.cli.check import CheckCommand, build_request
from memplan.cli.options import FIELDS, OUTPUT, Option, format_option, job_options
from memplan.cli.output import Output
from memplan.errors import MemplanError
from memplan.names import printable

RECOGNISED, NOT_RECOGNISED = 0, 1
_HELP = """Say what an out-of-memory text means, and what to change.

FILE is a log of any size; without one the text is read from standard input. With --model and the
options of the run, as `memplan check` takes them, the run is planned again: the plan is held against
the text, and what would fit is named.

\b
Exit codes: 0 something was diagnosed, 1 nothing was recognised, 2 bad usage or input.
"""
_CLIPBOARDS = (
    ("pbpaste",),
    ("wl-paste", "--no-newline"),
    ("xclip", "-selection", "clipboard", "-out"),
    ("xsel", "--clipboard", "--output"),
    ("powershell.exe", "-NoProfile", "-Command", "Get-Clipboard"),
)


def command() -> click.Command:
    """The verb, for the command group."""
    cards = "Cards of the job, as `memplan check` takes them. The text's own card if left out."
    return CheckCommand(
        "diagnose",
        callback=diagnose,
        help=_HELP,
        short_help="Explain an out-of-memory text.",
        params=[
            click.Argument(["file"], metavar="[FILE]", required=False),
            Option("paste", section=OUTPUT, is_flag=True, help="Read the clipboard, else until end of file."),
            Option(
                "model",
                section="Model",
                metavar="MODEL",
                help="Plan this model's run again, beside the text.",
            ),
            *job_options(cards),
            format_option("kind, phase and cause alone"),
        ],
    )


@click.pass_obj
def diagnose(
    output: Output,
    /,
    file: str | None,
    paste: bool,
    model: str | None,
    gpus: str | None,
    no_cache: bool,
    **given: Any,
) -> int:
    """Answer on the output and return the exit code."""
    _check_options(model, gpus, given)
    diagnosis = _read(output, file, paste)
    if model is not None:
        request = build_request(model, gpus if gpus is not None else _text_card(diagnosis), given)
        from memplan.diagnosis.replan import replanned

        with output.status(f"Planning the run of {model} again"):
            diagnosis = replanned(diagnosis, request, use_cache=not no_cache)
    output.diagnosis(diagnosis)
    return RECOGNISED if diagnosis.recognised else NOT_RECOGNISED


def _check_options(model: str | None, gpus: str | None, given: dict[str, Any]) -> None:
    stated = [field.name for field in FIELDS if given.get(field.name) is not None]
    stated += ["gpus"] if gpus is not None else []
    if model is None and stated:
        raise MemplanError(
            "no-model",
            f"`--{stated[0]}` is given and no model",
            context="a run can be planned again only if its model is known",
            hint="Name it: `--model meta-llama/Llama-2-7b-hf`",
        )


def _read(output: Output, file: str | None, paste: bool) -> Any:
    from memplan.diagnosis.parse import diagnose, diagnose_rows
    from memplan.diagnosis.scan import read_rows

    if paste:
        if file is not None:
            raise MemplanError("bad-usage", "FILE and `--paste` exclude each other")
        text = _clipboard()
        if text is not None:
            return diagnose(text)
    if file is not None and file != "-":
        try:
            with open(file, "rb") as stream:  # noqa: PTH123
                return diagnose_rows(*read_rows(stream))
        except OSError as error:
            reason = (error.strerror or "it can't be read").lower()
            raise MemplanError("no-such-file", f"`{printable(file)}` can't be read: {reason}") from None
    if sys.stdin.isatty():
        output.remark("note", "Paste the text, then end it with Ctrl-D (Ctrl-Z and Enter on Windows)")
    return diagnose_rows(*read_rows(_stdin()))


def _stdin() -> BinaryIO:
    return sys.stdin.buffer


def _clipboard() -> str | None:
    """The clipboard's text, from whichever of the systems' tools is there."""
    for words in _CLIPBOARDS:
        if shutil.which(words[0]) is None:
            continue
        try:
            answer = subprocess.run(words, capture_output=True, timeout=5, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.decode("utf-8", "replace")
    return None


def _text_card(diagnosis: Any) -> str | None:
    """The text's own card in `--gpus`' words; None asks for this machine's."""
    for event in diagnosis.events[:1]:
        total = event.figures.total_bytes
        if total is not None and total >= 1 << 30:
            return f"{total / (1 << 30):.2f}GiB"
    return None
