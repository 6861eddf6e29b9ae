"""`memplan probe`: which GPUs this machine has, and what is on them now."""

from __future__ import annotations

import time

import click

from memplan.cli.options import OUTPUT, Option, format_option
from memplan.cli.output import Output
from memplan.errors import ExitCode

_HELP = """Show the GPUs of this machine, what they are and who holds their memory, through NVML.

\b
Exit codes: 0 all is known that planning needs, 2 no GPU or no driver, 3 the memory of a card that
a program would see is unknown.
"""
_LEAST_SECONDS = 0.1


def command() -> click.Command:
    """The verb, for the command group."""
    return click.Command(
        "probe",
        callback=show,
        help=_HELP,
        short_help="Show the GPUs of this machine.",
        params=[
            Option(
                "watch",
                section=OUTPUT,
                type=click.FloatRange(min=_LEAST_SECONDS),
                is_flag=False,
                flag_value=2.0,
                metavar="[SECONDS]",
                help="Look again and again, every 2 s or as often as said, until interrupted.",
            ),
            format_option("what --gpus takes"),
        ],
    )


@click.pass_obj
def show(output: Output, /, watch: float | None, **_: object) -> int:
    """Answer on the output and return the exit code; with `watch` never."""
    from memplan.gpus.probe import probe

    found = probe()
    while watch is not None:
        output.indent = None
        output.redraw()
        output.probe(found)
        time.sleep(watch)
        found = probe()
    output.probe(found)
    return int(ExitCode.FITS if found.is_complete else ExitCode.UNKNOWN)
