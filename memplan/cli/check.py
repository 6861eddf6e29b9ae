"""`memplan check`: will this fine-tune fit, and what fills the card?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from memplan.cli.options import (
    OUTPUT,
    SECTIONS,
    format_option,
    job_options,
    normalized,
    request_values,
)
from memplan.cli.output import Output
from memplan.errors import ExitCode
from memplan.request.types import CardSpec, Origin, Request

_HELP = """Predict the GPU memory of a fine-tune, by running its training step without a GPU.

MODEL is a hub id, a local directory, a config.json, or a name from memplan's catalogue. Of a model
on the hub only its config and the headers of its weights are read.

Options are Hugging Face's, with the defaults of transformers' Trainer; --lora_r may be written
--lora-r, and --bf16 may be written --bf16 True.

\b
Exit codes: 0 it fits, 1 it does not fit, 2 bad usage or input, 3 unknown.
"""
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""As torch ranks them, c10/core/AllocatorConfig.h."""


class CheckCommand(click.Command):
    """A click command that reads Hugging Face's spellings and groups its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, after the spellings that click doesn't know."""
        return super().parse_args(ctx, normalized(args))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, section by section."""
        for section in (*SECTIONS, OUTPUT):
            records = [
                record
                for parameter in self.get_params(ctx)
                if isinstance(parameter, click.Option) and getattr(parameter, "section", OUTPUT) == section
                if (record := parameter.get_help_record(ctx)) is not None
            ]
            with formatter.section(section):
                formatter.write_dl(records)


def command() -> click.Command:
    """The verb, for the command group."""
    cards = "Cards of the job: 3x23.64GiB, 2xRTX4090, H100-80GB. This machine's if left out."
    return CheckCommand(
        "check",
        callback=check,
        help=_HELP,
        short_help="Predict the GPU memory of a fine-tune.",
        params=[
            click.Argument(["model"], metavar="MODEL"),
            *job_options(cards),
            format_option("the verdict alone"),
        ],
    )


@click.pass_obj
def check(output: Output, /, model: str, gpus: str | None, no_cache: bool, **given: Any) -> int:
    """Answer on the output and return the exit code."""
    request = build_request(model, gpus, given)
    from memplan.request.validate import validate

    validate(request)
    from memplan import plan

    with output.status(f"Running a training step of {model} without a GPU"):
        answer = plan.check(request, use_cache=False) if no_cache else plan.check(request)
    output.plan(answer)
    return int(exit_code(answer.verdict))


def build_request(model: str, gpus: str | None, given: dict[str, Any]) -> Request:
    """What was typed, as a request: nothing is resolved, only stated."""
    values, origins = request_values(given)
    cards, where = _cards(gpus)
    origins["cards"] = Origin(value=[card.name for card in cards], stated=gpus is not None, where=where)
    if "alloc_conf" not in values:
        for variable in _VARIABLES:
            if conf := os.environ.get(variable):
                values["alloc_conf"] = conf
                origins["alloc_conf"] = Origin(
                    value=conf, stated=False, where=f"{variable} of this environment"
                )
                break
    return Request(model=model, cards=tuple(cards), origins=origins, **values)


def exit_code(verdict: str) -> ExitCode:
    """The process's answer; tight still fits."""
    codes = {"fits": ExitCode.FITS, "tight": ExitCode.FITS, "does not fit": ExitCode.DOES_NOT_FIT}
    return codes.get(verdict, ExitCode.UNKNOWN)


def _cards(gpus: str | None) -> tuple[Sequence[CardSpec], str]:
    if gpus is not None:
        from memplan.gpus.parse import parse_cards

        return parse_cards(gpus), "`--gpus`"
    from memplan.gpus.probe import probe_cards

    return probe_cards(), "the cards of this machine"
