"""What replays of a cached timeline gave, kept beside it: a question asked again replays nothing.

One JSON file a timeline, `KEY.answers.json`. It may be deleted at any time; one that can't be read is
ignored, and written anew.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memplan.timeline import Timeline
from memplan.trace.cache import cache_directory, own_sources

KEY = "cache_key"
"""In `Timeline.facts`: what the timeline is kept under; missing where nothing is kept."""


def recalled(timeline: Timeline, question: str, compute: Callable[[], Any]) -> Any:
    """The answer to a question about a timeline, of JSON's own types: read, or computed and written."""
    key = timeline.facts.get(KEY)
    if key is None:
        return compute()
    path = cache_directory() / f"{key}.answers.json"
    known = _read(path)
    name = hashlib.sha256(f"{own_sources('allocator', 'plan')} {question}".encode()).hexdigest()[:24]
    if name not in known:
        known[name] = compute()
        _write(path, known)
    return known[name]


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump(known, file)
        Path(file.name).replace(path)
    except OSError:
        return  # the timeline's own note tells that nothing can be kept
