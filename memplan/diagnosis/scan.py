"""Logs of any size: what lies around possible failures, and how the log begins and ends, is kept; the rest
streams past.

A chunk is searched for a few literals that all wordings of consequence share. A hit counts where its line
holds a wording's needle. The kept windows are bounded in number and size: the earliest stay, since the first
failure is what counts, and so do the latest.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO

from memplan.diagnosis.lines import split_lines
from memplan.diagnosis.wordings import wordings

WHOLE = 2 << 20
"""A text no larger is parsed whole."""
_CHUNK = 128 << 10
_BEFORE = 24 << 10
_AFTER = 6 << 10
_ENDS = 128 << 10
_LONGEST_PIECE = 512 << 10
_FIRST_PIECES, _LAST_PIECES = 48, 16
_LINE = 400
_OVERLAP = 64
_PATIENCE = 20_000
"""Hits in vain after which a literal gives way to stricter forms: some logs speak of memory on every line."""
_LITERALS: dict[bytes, tuple[bytes, ...]] = {
    b"emory": (b"ut of memory", b"allocate memory", b"hared memory", b"nough memory"),
    b"_MEMORY": (b"OF_MEMORY", b"DEVICE_MEMORY"),
    b"illed": (b" Killed ", b"OOMKilled"),
    b"code: -9": (),
    b"_STATUS_": (b"STATUS_ALLOC", b"STATUS_NOT_INIT"),
}
"""Few, since each costs a pass. What has none of them ends a job, as a rule, and stands at the log's end."""


def read_rows(stream: BinaryIO) -> tuple[list[tuple[int, str]], int]:
    """Numbered lines of the stream, all or those near anything of note, and how many it has in all."""
    head = stream.read(WHOLE + 1)
    if len(head) <= WHOLE:
        text = decoded(head)
        return split_lines(text), text.count("\n") + bool(text)
    windows = _Windows()
    for chunk in _as_utf8(_chunks(head, stream)):
        windows.feed(chunk)
    rows = []
    for line, piece in windows.pieces():
        rows += split_lines(piece.decode("utf-8", "replace"), line)
    return rows, windows.line + 1


def decoded(data: bytes) -> str:
    """The text of a file; PowerShell's redirection writes UTF-16."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "replace")


def _chunks(head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    yield head
    while chunk := stream.read(_CHUNK):
        yield chunk


def _as_utf8(chunks: Iterable[bytes]) -> Iterator[bytes]:
    decoder: codecs.IncrementalDecoder | None = None
    for number, chunk in enumerate(chunks):
        if number == 0 and chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            decoder = codecs.getincrementaldecoder("utf-16")("replace")
        yield decoder.decode(chunk).encode("utf-8", "replace") if decoder else chunk


@dataclass
class _Windows:
    """The pieces kept so far, in order, and what is needed to go on at the next chunk."""

    line: int = 0
    """Line ends seen."""
    first: list[tuple[int, bytearray]] = field(default_factory=list)
    last: list[tuple[int, bytearray]] = field(default_factory=list)
    _before: bytes = b""
    _end: bytes = b""
    _offset: int = 0
    """Of the next chunk in the stream."""
    _kept_until: int = 0
    _owed: int = 0
    """Bytes of the next chunk that still belong to the last piece."""
    _literals: list[bytes] = field(default_factory=lambda: list(_LITERALS))
    _in_vain: dict[bytes, int] = field(default_factory=dict)

    def feed(self, chunk: bytes) -> None:
        """Search a chunk and keep what is of note."""
        self._settle(chunk)
        text = self._before + chunk
        start_line = self.line - self._before.count(b"\n")
        begin = self._offset - len(self._before)
        if self._offset == 0:
            self._keep(text, 0, min(_ENDS, len(text)), begin, start_line)
        for hit in self._hits(text, max(0, len(self._before) - _OVERLAP)):
            self._keep(text, max(0, hit - _BEFORE), hit + _AFTER, begin, start_line)
        self.line += chunk.count(b"\n")
        self._offset += len(chunk)
        self._before = text[-_BEFORE:]
        self._end = (self._end + chunk)[-_ENDS:] if len(chunk) < _ENDS else chunk[-_ENDS:]

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """The kept pieces with the end of the log, each with its first line's number."""
        begin = self._offset - len(self._end)
        self._owed = 0
        self._keep(self._end, 0, len(self._end), begin, self.line - self._end.count(b"\n"))
        for line, piece in (*self.first, *self.last):
            yield line + 1, bytes(piece)

    def _hits(self, text: bytes, begin: int) -> list[int]:
        hits: list[int] = []
        places = [(literal, begin) for literal in self._literals]
        for literal, at in places:
            at = text.find(literal, at)
            while at >= 0:
                start, end = text.rfind(b"\n", max(0, at - _LINE), at) + 1, text.find(b"\n", at, at + _LINE)
                end = end if end >= 0 else min(len(text), at + _LINE)
                if _is_of_note(text[max(start, at - _LINE) : end]):
                    hits.append(at)
                    # what follows so closely is kept with it anyway
                    end = max(end, min(at + _AFTER // 2, len(text)))
                elif stricter := self._out_of_patience(literal):
                    places += [(other, at) for other in stricter]
                    break
                at = text.find(literal, end)
        return sorted(hits)

    def _out_of_patience(self, literal: bytes) -> tuple[bytes, ...]:
        """The stricter forms from here on, where there are some and it is time."""
        self._in_vain[literal] = self._in_vain.get(literal, 0) + 1
        if self._in_vain[literal] < _PATIENCE or not _LITERALS.get(literal):
            return ()
        self._literals.remove(literal)
        self._literals += _LITERALS[literal]
        return _LITERALS[literal]

    def _keep(self, text: bytes, start: int, end: int, begin: int, start_line: int) -> None:
        """Keep `text[start:end]`, less what is kept already, from the beginning of a line on."""
        start = max(start, self._kept_until - begin)
        end = max(end, start)
        follows = start == self._kept_until - begin and bool(self.first or self.last)
        if not follows and start > 0:
            start = max(start, text.find(b"\n", start, end) + 1)
        piece = text[start:end]
        if follows and len(self._latest) + len(piece) <= _LONGEST_PIECE:
            self._latest.extend(piece)
        elif piece:
            self._add(start_line + text.count(b"\n", 0, start), piece)
        self._kept_until = begin + min(end, len(text))
        self._owed = max(0, end - len(text))

    @property
    def _latest(self) -> bytearray:
        return (self.last or self.first)[-1][1]

    def _add(self, line: int, piece: bytes) -> None:
        if len(self.first) < _FIRST_PIECES:
            self.first.append((line, bytearray(piece)))
            return
        self.last.append((line, bytearray(piece)))
        del self.last[:-_LAST_PIECES]

    def _settle(self, chunk: bytes) -> None:
        if self._owed:
            self._latest.extend(chunk[: self._owed])
            self._kept_until += min(self._owed, len(chunk))
            self._owed = max(0, self._owed - len(chunk))


def _is_of_note(line: bytes) -> bool:
    lowered = line.lower()
    return any(needle in lowered for needle in _needles())


@lru_cache(maxsize=1)
def _needles() -> tuple[bytes, ...]:
    return tuple({wording.needle.encode() for wording in wordings()})
