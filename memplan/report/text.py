"""Text for a terminal: nothing from outside may steer it, and a plain one gets plain characters."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from typing import TextIO

from memplan.names import without_escapes

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼╞╡╪╟╢", "+"),
        **dict.fromkeys("─━═╌", "-"),
        **dict.fromkeys("│┃║", "|"),
        "■": "*", "█": "#", "▒": "=", "░": ".", "×": "x", "–": "-", "—": "-", "·": "-", "→": ">", "…": "~",
    }
)  # fmt: skip
"""One character for one, so that columns stay where they are."""


def clean(text: object) -> str:
    """Text from outside without escape sequences, control and invisible formatting characters."""
    visible = without_escapes(str(text))
    return "".join(c for c in visible if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))


def clean_line(text: object) -> str:
    """The same on one line."""
    return " ".join(clean(text).split())


def to_ascii(text: str) -> str:
    """The same text for a terminal that shows ASCII alone; what has no counterpart becomes `?`."""
    return text.translate(_PLAIN).encode("ascii", "replace").decode("ascii")


def is_plain(stream: TextIO, environ: Mapping[str, str] | None = None) -> bool:
    """Whether the stream can be trusted with ASCII alone.

    Python itself turns a C locale into UTF-8 and sets LC_CTYPE so (PEP 538), so the encoding isn't enough.
    """
    env = os.environ if environ is None else environ
    if env.get("TERM") == "dumb":
        return True
    encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
    if not encoding.startswith("utf"):
        return True
    locale = env.get("LC_ALL") or env.get("LANG") or ""
    return locale in ("C", "POSIX")


def wants_color(stream: TextIO, environ: Mapping[str, str] | None = None) -> bool:
    """Whether to colour: a terminal, unless NO_COLOR or TERM=dumb say otherwise."""
    env = os.environ if environ is None else environ
    if env.get("NO_COLOR") or env.get("TERM") == "dumb":
        return False
    return bool(env.get("FORCE_COLOR")) or stream.isatty()
