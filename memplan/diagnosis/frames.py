"""The frames of a traceback: Python's own, IPython's old and new, Rich's and pytest's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from memplan.diagnosis.lines import Line, Stream
from memplan.diagnosis.types import Frame

_BACK = 500
_FORWARD = 12
_MOST = 200
_PATTERNS = (
    re.compile(r'\s{0,80}File \\?"(?P<path>[^"]{1,400})", line \d{1,7}(?:, in (?P<function>.{1,200}))?'),
    re.compile(r"\s{0,80}File (?P<path>\S{1,400}):\d{1,7}(?:, in (?P<function>.{1,200}))?"),
    re.compile(
        r"\s{0,80}(?P<path>(?:Cell|Input) In ?\[\d{1,5}\])(?:, line \d{1,7}| in )(?P<function>.{0,80})"
    ),
    re.compile(
        r"\s{0,8}(?P<path>(?:[~/.<]|[A-Za-z]:)[^\s:]{1,400}) in (?P<function>[\w<>.]{1,120}\(.{0,200})"
    ),
    re.compile(r"\s{0,8}(?P<path>\S{1,400}\.py):\d{1,7}:?\s{1,12}in (?P<function>[\w<>.]{1,120})"),
)
_ARROW = re.compile(r"\s{0,8}-{1,6}> ?\d{1,6} ?(?P<source>.{1,300})")
_MARKS = re.compile(r"\s*[\^~]+\s*$")


def frames_of(stream: Stream, index: int, since: int) -> tuple[Frame, ...]:
    """The frames that lead to the error on line `index`, outermost first; none from before line `since`."""
    first = index
    while first > 0 and index - first < _BACK and stream.lines[first - 1].number >= since:
        first -= 1
    before = stream.lines[first : index + 1]
    frames = _parsed(_last_traceback(before))
    return frames or _parsed(stream.lines[index : index + _FORWARD])


def _last_traceback(lines: Sequence[Line]) -> Sequence[Line]:
    """From the last header that has frames below it; all lines where there is none."""
    has_frames = False
    for index in range(len(lines) - 1, -1, -1):
        has_frames = has_frames or _frame(lines[index].text) is not None
        if has_frames and "Traceback (most recent call last)" in lines[index].text:
            return lines[index:]
    return lines


def _parsed(lines: Sequence[Line]) -> tuple[Frame, ...]:
    frames: list[Frame] = []
    for line in lines:
        frame = _frame(line.text)
        if frame is not None:
            frames.append(frame)
        elif frames and not frames[-1].source:
            arrow = _ARROW.match(line.text)
            text = arrow["source"] if arrow else line.text
            if text.strip() and not _MARKS.match(text) and (arrow or line.text.startswith("    ")):
                last = frames[-1]
                frames[-1] = Frame(path=last.path, function=last.function, source=text.strip()[:300])
    return tuple(frames[-_MOST:])


def _frame(text: str) -> Frame | None:
    if "File " not in text and " in " not in text and " In" not in text:
        return None
    for pattern in _PATTERNS:
        match = pattern.match(text)
        if match is not None:
            function = (match["function"] or "").strip().split("(")[0]
            return Frame(path=match["path"], function=function)
    return None
