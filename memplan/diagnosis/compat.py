"""Known conflicts of versions and arguments: read from `compat.json`, found in texts and in environments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from memplan.diagnosis.lines import Stream
from memplan.diagnosis.types import CompatMatch, Kind
from memplan.diagnosis.wordings import compiled

DATA = Path(__file__).with_name("compat.json")
_CONDITION = re.compile(r"(<=|>=|<|>|==)\s*(\d+(?:\.\d+)*)")
_RELEASE = re.compile(r"(?:\d+!)?(\d+(?:\.\d+)*)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the data file."""

    id: str
    title: str
    level: Literal["error", "notice"]
    """A notice doesn't stop a job by itself."""
    kind: Kind
    needle: str
    """A literal of `pattern`, in lower case."""
    pattern: str
    cause: str
    versions: str
    affected: Mapping[str, str]
    """Package → versions, where installed versions alone can tell. All must hold."""
    fix: str
    source: str

    def match(self, line: int | None = None) -> CompatMatch:
        """The entry as an answer."""
        return CompatMatch(
            id=self.id,
            title=self.title,
            cause=self.cause,
            versions=self.versions,
            fix=self.fix,
            source=self.source,
            line=line,
        )


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """The data file."""
    return tuple(Entry(**row) for row in json.loads(DATA.read_text(encoding="utf-8")))


def found_in(stream: Stream) -> list[tuple[Entry, int]]:
    """Entries that the stream's text shows, each once, with the offset of the first."""
    found = []
    for entry in entries():
        if entry.needle in stream.lower and (match := compiled(entry.pattern).search(stream.lower)):
            found.append((entry, match.start()))
    return sorted(found, key=lambda pair: pair[1])


def affected_by(installed: Mapping[str, str]) -> list[Entry]:
    """Entries whose packages are all installed in versions that they name."""
    return [
        entry
        for entry in entries()
        if entry.affected
        and all(
            name in installed and satisfies(installed[name], spec) for name, spec in entry.affected.items()
        )
    ]


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version's release meets `>=4.41,<5`; pre-releases count as the release they lead to."""
    release = _RELEASE.match(version)
    if release is None:
        return False
    mine = _numbers(release[1])
    conditions = _CONDITION.findall(specifier)
    return bool(conditions) and all(_holds(mine, operator, _numbers(other)) for operator, other in conditions)


def _holds(mine: tuple[int, ...], operator: str, other: tuple[int, ...]) -> bool:
    width = max(len(mine), len(other))
    a, b = mine + (0,) * (width - len(mine)), other + (0,) * (width - len(other))
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b}[operator]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part[:9]) for part in text.split("."))
