"""Timelines kept on disk, so that a question asked again needs no torch.

Keyed by the model's config, the request, the card's kernels, the versions of the libraries whose code ran,
and this package's own sources. The directory may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from memplan.models.types import ModelFacts
from memplan.request.types import CardSpec, Request
from memplan.timeline import Timeline

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
LARGEST_CACHE_BYTES = 512 << 20
"""Beyond this the entries that were used least recently go."""

# What a timeline doesn't depend on: who asks, where values come from, what the timeline is replayed against.
_BESIDES = ("model", "token", "revision", "origins", "cards", "alloc_conf")


def cached_trace(
    request: Request, facts: ModelFacts, card: CardSpec | None, *, use_cache: bool = True
) -> tuple[Timeline, bool, tuple[str, ...]]:
    """The timeline of a job, whether it was read from the cache, and notes about the cache."""
    from memplan.trace import trace

    if not use_cache:
        return trace(request, facts, card), False, ()
    key = cache_key(request, facts, card)
    path = cache_directory() / f"{key}.timeline"
    notes: tuple[str, ...] = ()
    try:
        timeline = Timeline.from_bytes(path.read_bytes())
        os.utime(path)
        timeline.facts["cache_key"] = key
        return timeline, True, ()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes = (f"ignored a cache entry that can't be read ({error}): {path}",)
    timeline = trace(request, facts, card)
    notes += _store(path, timeline)
    if path.exists():
        timeline.facts["cache_key"] = key
    return timeline, False, notes


def cache_directory() -> Path:
    """`$MEMPLAN_CACHE_DIR`, or `memplan` in the user's cache directory."""
    stated = os.environ.get("MEMPLAN_CACHE_DIR")
    if stated:
        return Path(stated)
    import platformdirs

    return Path(platformdirs.user_cache_dir("memplan", appauthor=False))


def cache_key(request: Request, facts: ModelFacts, card: CardSpec | None) -> str:
    """A digest of everything that the timeline depends on."""
    asked = {k: v for k, v in asdict(request).items() if k not in _BESIDES}
    kernels = (card.compute_capability, card.multiprocessor_count) if card is not None else None
    what: dict[str, Any] = {
        "config": dict(facts.config),
        "request": asked,
        "kernels": kernels,
        "versions": library_versions(),
        "sources": own_sources("trace"),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """Version by library, of those whose code runs in a trace; `not installed` where one is missing."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def own_sources(*folders: str) -> str:
    """A digest of this package's files in `folders`, by size and time: what is kept is theirs."""
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for folder in folders for path in (package / folder).rglob("*.py")):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _store(path: Path, timeline: Timeline) -> tuple[str, ...]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            file.write(timeline.to_bytes())
        Path(file.name).replace(path)
        _make_room(path.parent)
    except OSError as error:
        return (f"the timeline was not cached: {error}",)
    return ()


def _make_room(directory: Path) -> None:
    entries = sorted(directory.glob("*.timeline"), key=lambda p: p.stat().st_mtime)
    total = sum(entry.stat().st_size for entry in entries)
    while entries and total > LARGEST_CACHE_BYTES:
        oldest = entries.pop(0)
        total -= oldest.stat().st_size
        oldest.unlink(missing_ok=True)
        oldest.with_suffix(".answers.json").unlink(missing_ok=True)
