"""A `MemplanError` as a person reads it. Every error that memplan shows goes through here."""

from __future__ import annotations

import textwrap

from memplan.errors import MemplanError
from memplan.report.text import clean, to_ascii

_STYLES = {"error": "1;31", "why": "2", "note": "2", "hint": "36"}
_INDENT = "  "


def render_error(
    error: MemplanError, *, color: bool = False, plain: bool = False, width: int | None = None
) -> str:
    """The error's text: what, why, whose fault, what to do; wrapped where a width is given."""
    lines = _wrapped(f"error[{error.reference}]", clean(error.message), "error", color, width, indent="")
    for label, text in (("why", error.context), ("note", error.note), ("hint", error.hint)):
        for line in clean(text).splitlines() if text else ():
            lines += _wrapped(label, line, label, color, width, indent=_INDENT)
    text = "\n".join(lines)
    return to_ascii(text) if plain else text


def render_remark(label: str, text: str, *, color: bool = False, plain: bool = False) -> str:
    """A `hint: …` or `warning: …` line for stderr."""
    line = f"{_styled(label, label, color)}: {' '.join(clean(text).split())}"
    return to_ascii(line) if plain else line


def _wrapped(label: str, text: str, style: str, color: bool, width: int | None, *, indent: str) -> list[str]:
    head = f"{indent}{label}: "
    lines = [head + text]
    if width is not None:
        lines = textwrap.wrap(
            text,
            max(width, 20),
            initial_indent=head,
            subsequent_indent=indent + _INDENT,
            break_on_hyphens=False,
            break_long_words=False,
        ) or [head]
    lines[0] = indent + _styled(label, style, color) + lines[0][len(indent) + len(label) :]
    return lines


def _styled(text: str, style: str, color: bool) -> str:
    code = _STYLES.get(style, "33")
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
