"""`memplan doctor`: is this environment fit to fine-tune in?"""

from __future__ import annotations

import click

from memplan.cli.output import FORMATS, Output
from memplan.errors import ExitCode

HEALTHY, PROBLEMS = int(ExitCode.FITS), int(ExitCode.DOES_NOT_FIT)
_HELP = """Hold the installed versions against known conflicts, and report the environment.

Versions, torch's CUDA, the backends of bitsandbytes and the GPUs are read without importing them.

\b
Exit codes: 0 no known problem, 1 problems found, 2 bad usage.
"""


def command() -> click.Command:
    """The verb, for the command group."""
    return click.Command(
        "doctor",
        callback=doctor,
        help=_HELP,
        short_help="Check the environment before anything breaks.",
        params=[
            click.Option(
                ["--format"],
                type=click.Choice(FORMATS),
                default="auto",
                help="human, json, or quiet (the number of problems alone).",
            )
        ],
    )


@click.pass_obj
def doctor(output: Output, /, format: str) -> int:
    """Answer on the output and return the exit code."""
    from memplan.diagnosis.doctor import doctor

    health = doctor()
    output.health(health)
    return PROBLEMS if health.problems else HEALTHY
