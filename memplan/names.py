"""Names that people type: shown safely, and answered with the nearest that exist."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

SHOWN_CHARACTERS = 100

_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, the cursor
    r"|(?:\x1b[\]PX^_]|\x9d).*?(?:\x07|\x1b\\|\x9c|$)"  # OSC, DCS and the like: titles, links, clipboard
    r"|\x1b.?",
    re.DOTALL,
)
# Controls, formats (bidirectional overrides, zero width), surrogates, unassigned and private, separators.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}


def without_escapes(text: str) -> str:
    """`text` without the sequences by which it could steer a terminal."""
    return _ESCAPE.sub("", text)


def printable(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """`text` as a message may quote it: no escape sequence, control or backtick, no more than `limit`."""
    kept = without_escapes(text[: 8 * limit])
    kept = "".join(c for c in kept if unicodedata.category(c) not in _UNPRINTABLE)
    kept = re.sub(r"\s", " ", kept).replace("`", "'")
    if not kept.strip():
        return "(no printable character)"
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def nearest(name: str, known: Iterable[str], count: int) -> list[str]:
    """Up to `count` of `known` that `name` may be a slip for, the most alike first."""
    from difflib import get_close_matches  # a miss alone pays for this import

    return get_close_matches(name[:SHOWN_CHARACTERS], list(known), n=count, cutoff=0.6)


def listed(names: Iterable[str], last: str = "or") -> str:
    """`a`, `b` or `c`: names quoted and joined for a sentence."""
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {last} {quoted[-1]}"
