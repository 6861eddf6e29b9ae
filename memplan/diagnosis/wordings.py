"""How each library words it: one table, `wordings.tsv`, each row with where the wording was read.

A pattern is matched against a stream's text on one line in lower case. It starts with, or lies close to, its
`needle`, a literal that is looked for first: a pattern costs nothing where its needle is absent. No pattern
repeats without a bound or nests a repetition, so that no text can make one slow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from memplan.diagnosis.types import Kind

DATA = Path(__file__).with_name("wordings.tsv")
SIZE = r"-?\d[\d,]{0,26}(?:\.\d{1,12})?\s{0,2}(?:bytes?|[kmgtpe]i?b{0,2}|b)\b"
"""A number with its unit, as messages have them; `{SIZE}` in the table."""


@dataclass(frozen=True)
class Wording:
    """One way to say that something ran out, or that looks as if it did."""

    kind: Kind
    framework: str
    needle: str
    pattern: str
    source: str
    is_weak: bool
    """Part of a message, or a summary of it: counts where no full message is near."""


@lru_cache(maxsize=1)
def wordings() -> tuple[Wording, ...]:
    """The table. Where two match at one place, the earlier row counts."""
    rows = (line.split("\t") for line in DATA.read_text(encoding="utf-8").splitlines() if "\t" in line)
    return tuple(
        Wording(
            cast(Kind, kind), framework, needle, pattern.replace("{SIZE}", SIZE), source, strength == "weak"
        )
        for kind, framework, strength, needle, pattern, source in rows
        if not kind.startswith("#")
    )


@lru_cache(maxsize=512)
def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern, compiled when it is first needed: most never are."""
    return re.compile(pattern)
