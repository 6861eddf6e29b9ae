"""A pasted text made plain: colours, quotes, rank prefixes and line ends off, line numbers kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,40}[ -/]{0,4}[@-~]|\x1b\][^\x07\x1b\n]{0,500}(?:\x07|\x1b\\)?|\x1b.?"
)
_LOST_COLORS = re.compile(r"\[\d{1,2}(?:;\d{1,3}){0,4}m")
"""Colours whose escape character a web page swallowed."""
_CONTROLS = {code: None for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}

_STAMP = r"(?:\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,\d]{0,12}(?:Z|[+-]\d\d:?\d\d)?\]?[:, ]{0,3})"
_RANK = (
    r"(?:\[(?:default|rank ?|Rank ?|RANK ?|gpu|GPU )?(\d{1,5})\](?:<std\w{3}>)?:"  # torchrun, elastic --tee
    r"|\[\d{1,5},(\d{1,5})\](?:<std\w{3}>)?:"  # mpirun --tag-output
    r"|\((?:\w{1,40} )?(?:rank|ranks)=(\d{1,5})[^)\n]{0,80}\)"
    r"|(?:rank|Rank|RANK) ?(\d{1,5}):"
    r"|\((?:\w{0,30}Worker\w{0,20}TP|Worker_TP|VllmWorker(?:Process)?[ _]TP)(\d{1,3})[^)\n]{0,40}\)"
    r"|\(\w{1,40} pid=\d{1,9}(?:, ip=[\d.]{1,40})?\)"
    r"|[\w.-]{1,60}-worker-(\d{1,5}):"
    r"|(?:worker|node)-?\d{1,5}:"
    r"|(\d{1,4}): (?=[ \[A-Za-z])"  # srun --label
    r")"
)
_QUOTES = r"[ \t>#|│┃❱]{0,60}(?:(?:[*/-]{1,4})[ \t]{1,8})?"
_PREFIX = re.compile(rf"^{_QUOTES}{_STAMP}?(?:{_RANK}[ \t]?)?(?=([ \t]{{0,200}}))", re.MULTILINE)
_INDENT_OF_A_FRAME = 24


@dataclass(frozen=True)
class Reading:
    """The text, twice: as lines with their prefixes, and flat for patterns, with as many line ends."""

    text: str
    first_line: int = 1

    @cached_property
    def flat(self) -> str:
        """The text without quotes and prefixes at the start of its lines."""
        return _PREFIX.sub("", self.text)

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the text, prefixes and all."""
        return self.text.split("\n")

    @cached_property
    def flat_lines(self) -> list[str]:
        """The lines of `flat`: as many as `lines`."""
        return self.flat.split("\n")

    def line_at(self, position: int) -> int:
        """Which line, from 0, a position in `flat` is on."""
        return self.flat.count("\n", 0, position)

    def rank_of(self, line: int) -> int | None:
        """The rank that a line's prefix names."""
        match = _PREFIX.match(self.lines[line][:400])
        if match is None:
            return None
        named = next((group for group in match.groups()[:-1] if group is not None), None)
        return None if named is None else int(named)

    def before(self, line: int, count: int, rank: int | None) -> list[str]:
        """Up to `count` plain lines before one, only those of its rank where it has one."""
        first = max(line - count, 0)
        chosen = range(first, line)
        if rank is not None:
            return [self.flat_lines[i] for i in chosen if self.rank_of(i) == rank]
        return self.flat_lines[first:line]


def plain(text: str) -> str:
    """The text without escape sequences, control characters and foreign line ends."""
    if "\x1b" in text or "\x9b" in text:
        text = _ESCAPES.sub("", text)
    if "m" in text and "[" in text:
        text = _LOST_COLORS.sub("", text)
    text = text.replace("\r\n", "\n").replace("\r", " " if "\n" in text else "\n")
    text = text.translate(_CONTROLS)
    return text.replace("\\n  File ", "\n  File ") if "\\n  File " in text else text


def decoded(data: bytes) -> str:
    """Bytes of a log as text; PowerShell writes UTF-16."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "replace")
