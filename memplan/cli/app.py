"""The command group, and the one place where an exception becomes a message and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from memplan import __version__
from memplan.cli.options import near_options
from memplan.cli.output import Output, format_asked_for
from memplan.errors import ExitCode, MemplanError
from memplan.names import listed, printable

VERBS = ("check", "diagnose", "probe", "doctor")
INTERRUPTED = 130
INTERNAL_ERROR = 70
_HELP = """The GPU memory of a fine-tune, predicted by running its training step without a GPU."""


class Verbs(click.Group):
    """Each verb is a module of `memplan.cli` with a `command`, imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"memplan.cli.{cmd_name}").command()
        return command


def group() -> click.Group:
    """All of memplan's command line."""
    verbs = Verbs("memplan", help=_HELP, context_settings={"max_content_width": 100}, no_args_is_help=False)
    return click.version_option(__version__, prog_name="memplan", message="%(prog)s %(version)s")(verbs)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; bad input never ends in a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    output, answer = Output(format_asked_for(arguments)), 0
    if not arguments:
        # a script whose arguments went missing must not read this as "it fits"
        arguments, answer = ["--help"], int(ExitCode.BAD_INPUT)
    try:
        result = group().main(arguments, prog_name="memplan", standalone_mode=False, obj=output)
        return answer or int(result or 0)
    except MemplanError as error:
        output.error(error)
        return int(error.exit_code)
    except click.UsageError as error:
        output.error(usage_error(error, arguments))
        return int(ExitCode.BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("MEMPLAN_TRACEBACK"):
            raise
        output.error(_internal_error(error))
        return INTERNAL_ERROR


def usage_error(error: click.UsageError, arguments: Sequence[str]) -> MemplanError:
    """click's complaint as ours."""
    verb = " ".join(argument for argument in arguments[:1] if argument in VERBS)
    help_of = error.ctx.command_path if error.ctx else f"memplan {verb}".strip()
    hint = f"`{help_of} --help` shows what there is"
    if isinstance(error, click.NoSuchOption):
        return _unknown_option(error, hint)
    if isinstance(error, click.MissingParameter) and error.param and error.param.name == "model":
        return MemplanError(
            "no-model",
            "no MODEL is named",
            hint="Put MODEL first, `memplan check MODEL`: a list option takes all words after it",
        )
    if isinstance(error, click.BadParameter) and error.param:
        message = f"`--{error.param.name}`: {_sentence(error.message)}"
        return MemplanError("bad-usage", message, hint=hint)
    return MemplanError("bad-usage", _sentence(error.format_message()), hint=hint)


def _unknown_option(error: click.NoSuchOption, hint: str) -> MemplanError:
    known = [name for p in error.ctx.command.params for name in p.opts] if error.ctx else []
    near = near_options(error.option_name, [name for name in known if name.startswith("--")])
    if near and len(error.option_name) > 2:
        hint = f"Did you mean {listed(near)}?"
    return MemplanError("unknown-option", f"no option is called `{printable(error.option_name)}`", hint=hint)


def _sentence(text: str) -> str:
    """A sentence in our style: no capital, no period, backticks for what click quotes."""
    text = text.strip().rstrip(".").replace("'", "`")
    return text[:1].lower() + text[1:]


def _internal_error(error: Exception) -> MemplanError:
    return MemplanError(
        "internal-error",
        f"memplan failed: {type(error).__name__}: {error}",
        hint="Run it again with `MEMPLAN_TRACEBACK=1` and report what it shows",
        note="This is a fault of memplan, not of your request",
    )
