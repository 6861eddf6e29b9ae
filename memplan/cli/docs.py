"""`docs/cli.md`, made from the command line itself: `python -m memplan.cli.docs` writes it anew."""

from __future__ import annotations

from pathlib import Path

import click

from memplan.cli.app import VERBS, group

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"
_WIDTH = 100
_HEAD = """# The command line

Made from `--help` by `python -m memplan.cli.docs`; a test compares the two.
"""
_SCHEMA = """
[plan.schema.json](../memplan/report/plan.schema.json) describes what `--format json` prints.
"""


def document() -> str:
    """The page's text."""
    verbs = group()
    root = click.Context(verbs, info_name="memplan", terminal_width=_WIDTH)
    parts = [_HEAD, _block("memplan", verbs.get_help(root))]
    for name in VERBS:
        command = verbs.get_command(root, name)
        if command is not None:
            context = click.Context(command, info_name=name, parent=root, terminal_width=_WIDTH)
            parts.append(_block(f"memplan {name}", command.get_help(context)))
    return "\n".join(parts) + _SCHEMA


def _block(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.strip()}\n```\n"


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(), encoding="utf-8")
