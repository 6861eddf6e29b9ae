"""A pasted text as streams of clean lines: escapes, quotes, frames and prefixes off, ranks put apart."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b|\\x1b\[|\\u001b\[|\\033\[|\^\[\[|\u241b\[)[0-?]{0,32}[ -/]{0,4}[@-~]"  # CSI
    r"|(?:\x1b[\]PX^_]|\x9d)[^\x07\x1b\x9c\n]{0,4096}(?:\x07|\x1b\\|\x9c)?"  # OSC and the like
    r"|\x1b.?"
    r"|\[\d{1,3}(?:;\d{1,3}){0,5}m"  # a colour whose escape was lost on the way
)
_INVISIBLE = dict.fromkeys(
    [
        *range(9),
        11,
        12,
        *range(14, 32),
        *range(127, 160),
        173,
        *range(8203, 8208),
        *range(8234, 8239),
        *range(8288, 8293),
        *range(8294, 8304),
        65279,
    ]
)
_SPACES = dict.fromkeys([0x09, 0xA0, 0x2007, 0x202F, 0x3000], " ")
_QUOTE = re.compile(r"\s{0,40}(?:[>│┃║|#]|//+|\* )[ ]?")
_BORDER = re.compile(r"[ ]{0,400}[│┃║|]\s*$")
_PREFIXES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\s{0,16}\[(?:rank|default|Rank |RANK )\s?(?P<rank>\d{1,5})\]:? ?",  # torch, torchrun
        r"(?:rank|Rank) ?(?P<rank>\d{1,5}): ",
        r"\[\d{1,5},(?P<rank>\d{1,5})\]<std(?:err|out)>: ?",  # mpirun --tag-output
        r"\((?:[A-Za-z]{1,40}_TP)(?P<rank>\d{1,4})[^()]{0,60}\) ?",  # vLLM's workers
        r"\([A-Za-z]{1,40}[^()]{0,60}\brank=(?P<rank>\d{1,5})[^()]{0,80}\) ?",
        r"\([A-Za-z]{1,40}[^()]{0,80}\bpid=\d{1,9}[^()]{0,80}\) ?",  # Ray's and vLLM's
        r"[A-Za-z][\w.-]{0,60}: (?=\[rank|\[default)",  # pdsh puts the host before
    )
)
_SRUN = re.compile(r"(?P<rank>\d{1,4}): ?")
_BORDERS = ("│", "┃", "║", "|")
_AFTER_QUOTES = frozenset((*_BORDERS, " ", "\t"))
_BEFORE_QUOTES = frozenset(" \t>#/*│┃║|")
_ENCODED = re.compile(r"=([0-9A-F]{2})")
_LONGEST_LINE = 20_000
_CONTINUED = 12


class Line(NamedTuple):
    """One line without what was wrapped around it."""

    number: int
    rank: int | None
    text: str


@dataclass(frozen=True)
class Stream:
    """The lines of one source, with its text on one line for patterns that a wrap would break."""

    lines: Sequence[Line]
    flat: str = field(repr=False)
    starts: Sequence[int] = field(repr=False)

    @cached_property
    def lower(self) -> str:
        """`flat` in lower case, offsets unchanged: only ASCII is lowered."""
        return self.flat.translate(_LOWER)

    def index_at(self, offset: int) -> int:
        """Which line an offset of `flat` lies in."""
        return max(0, bisect_right(self.starts, offset) - 1)


_LOWER = {ord(c): ord(c.lower()) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def clean(text: str) -> str:
    """One line without escape sequences, controls and invisible characters."""
    if "\x1b" in text or "[" in text or "\x9b" in text or "\x9d" in text:
        text = _ESCAPE.sub("", text)
    return text if text.isascii() and text.isprintable() else text.translate(_INVISIBLE).translate(_SPACES)


def split_lines(text: str, first: int = 1) -> list[tuple[int, str]]:
    """Numbered lines that hold anything, whichever system ended them; returns divide a progress bar."""
    if "\n" not in text and text.count("\r") > 1:
        text = text.replace("\r", "\n")
    rows: list[tuple[int, str]] = []
    for number, row in enumerate(text.split("\n"), first):
        if len(row) < 3 and not row.isalnum():
            continue
        if len(row) < _LONGEST_LINE and "\r" not in row and "\\n" not in row:
            rows.append((number, row))
        else:
            rows += ((number, part) for part in _divided(row))
    return rows


def _divided(row: str) -> Iterator[str]:
    # a log inside JSON has its line ends written out
    if "\\n" in row and ("call last):\\n" in row or "\\n  File" in row or row.count("\\n") > 3):
        row = row.replace("\\r\\n", "\r").replace("\\n", "\r").replace('\\"', '"')
    for part in row.split("\r"):
        for at in range(0, len(part), _LONGEST_LINE):
            yield part[at : at + _LONGEST_LINE]


def streams(rows: Iterable[tuple[int, str]]) -> list[Stream]:
    """The lines by their source, in the order in which the sources first speak."""
    numbered = [(number, row if _is_plain(row) else clean(row)) for number, row in rows]
    is_srun = _is_srun([row for _, row in numbered])
    quoted_printable = sum(row.endswith("=") for _, row in numbered) > 1
    sources: dict[str, list[Line]] = {}
    last, continued = "", 0
    for number, row in numbered:
        if row[:1] in _BEFORE_QUOTES or row[-1:] in _AFTER_QUOTES:
            row = _unquoted(row)
        if quoted_printable and "=" in row:
            row = _from_quoted_printable(row)
        source, rank, body = _parted(row, is_srun) if is_srun or _may_be_marked(row) else ("", None, row)
        if source:
            last, continued = source, 0
        elif last and _continues(row) and continued < _CONTINUED:
            # what wraps at a terminal's edge, or a message of several lines, has its prefix only once
            continued += 1
            sources[last].append(Line(number, None, body))
            continue
        else:
            last = ""
        sources.setdefault(source, []).append(Line(number, rank, body))
    return [_stream(lines) for lines in sources.values()]


def _is_plain(row: str) -> bool:
    return row.isascii() and row.isprintable() and "[" not in row and "\\" not in row and "^" not in row


def _may_be_marked(row: str) -> bool:
    return "[" in row or "(" in row or row[:4] in ("rank", "Rank")


def _unquoted(row: str) -> str:
    for _ in range(4):
        match = _QUOTE.match(row)
        if match is None:
            break
        row = row[match.end() :]
    row = row.rstrip()
    return _BORDER.sub("", row) if row.endswith(_BORDERS) else row


def _from_quoted_printable(row: str) -> str:
    row = row.removesuffix("=")
    return _ENCODED.sub(lambda match: chr(int(match[1], 16)), row) if "=" in row else row


def _parted(row: str, is_srun: bool) -> tuple[str, int | None, str]:
    """Prefix, rank and rest of a line; several prefixes may follow each other."""
    source, rank = "", None
    patterns = (*_PREFIXES, _SRUN) if is_srun else _PREFIXES
    for _ in range(3):
        for pattern in patterns:
            match = pattern.match(row)
            if match is not None:
                number = match.groupdict().get("rank")
                rank = int(number) if number is not None else rank
                source += match[0]
                row = row[match.end() :]
                break
        else:
            break
        if not _may_be_marked(row):
            break
    return source.strip(), rank, row


def _continues(row: str) -> bool:
    return (
        bool(row.strip())
        and "Traceback (most" not in row
        and not re.match(r"\s{0,8}File \"|\[?\d{4}-\d\d", row)
    )


def _is_srun(rows: Sequence[str]) -> bool:
    marked = sum(_SRUN.match(row) is not None for row in rows if row[:1].isdigit())
    return marked >= 3 and marked >= 0.8 * len(rows)


def _stream(lines: list[Line]) -> Stream:
    starts, parts, at = [], [], 0
    for line in lines:
        text = line.text
        if "\\n" in text or "**" in text:
            text = text.replace("\\n", " ").replace("**", "")
        text = " ".join(text.split())
        starts.append(at)
        parts.append(text)
        at += len(text) + 1
    return Stream(lines=lines, flat=" ".join(parts), starts=starts)
