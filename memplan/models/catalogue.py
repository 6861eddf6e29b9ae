"""The models that memplan knows without a network, and the short names that people type for them.

`catalog.json` holds one model a line: the fields of its config, where they were read, its parameter
count as transformers builds it, and whether that count equals one published independently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from memplan.models.config import checkpoint_dtype, quantized_with
from memplan.models.types import ModelFacts
from memplan.names import nearest

_FILE = Path(__file__).with_name("catalog.json")

_HAS_SIZE = re.compile(r"\d[bm]\b")
_VARIANT = re.compile(r"-(?:hf|pt|it|instruct|chat|\d+k|\d{4})$")
_VARIANT_OF_A_SIZE = re.compile(r"-(?:base|v\d+(?:\.\d+)?)$")
"""Dropped only where a size is left: `mistral-7b-v0.1` is a `mistral-7b`, but `t5-base` is no `t5`."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the catalogue, and by which full name of it the entry was found."""

    id: str
    meant: str
    """The hub id that the typed name stands for: `id`, or another of the same shapes."""
    others: tuple[str, ...]
    """Ids of other shapes that the typed name could stand for as well."""
    facts: Mapping[str, Any]
    """The line of `catalog.json`; shared, not to be changed."""

    @property
    def has_config(self) -> bool:
        """Whether the config is known: a few models are listed that publish none."""
        return "placeholder" not in self.facts

    @property
    def is_native(self) -> bool:
        """Whether transformers has the model's classes, so that no code of the checkpoint's is needed."""
        return bool(self.facts["native_in_transformers_5_23"])


def ids() -> tuple[str, ...]:
    """The ids of all models in the catalogue."""
    return tuple(_lines())


def find(name: str) -> Entry | None:
    """The model of that id, alias or short name, in any case; None where there is none.

    A name without an organisation may leave out what tells variants apart: `llama-2-13b` is
    `meta-llama/Llama-2-13b-hf`. Of several the fullest match wins, then an id before an alias, then
    the catalogue's order; `Entry.others` has the rest.
    """
    key = name.strip().casefold()
    if "/" in key:
        places = _full_names().get(key)
    else:  # `4_5` is a version in `minicpm-v-4_5`, `2_70b` two parts in `llama_2_70b`
        places = _short_names().get(_key(key)) or _short_names().get(_key(key.replace("_", "-")))
    if not places:
        return None
    best = places[0]
    rivals = dict.fromkeys(p.id for p in places if p.dropped == best.dropped and p.id != best.id)
    return Entry(id=best.id, meant=best.meant, others=tuple(rivals), facts=_lines()[best.id])


def near(name: str, count: int = 3) -> tuple[str, ...]:
    """Up to `count` hub ids in the catalogue that `name` may be a slip for, one a model, best first."""
    key = name.strip().casefold()
    known = _full_names() if "/" in key else _short_names()
    found: dict[str, str] = {}
    for match in nearest(key if "/" in key else _key(key), known, 5 * count):
        found.setdefault(known[match][0].id, known[match][0].meant)
    return tuple(found.values())[:count]


def facts_of(entry: Entry, typed: str) -> ModelFacts:
    """What the catalogue knows of a model; `typed` is the name that it was found by."""
    line = entry.facts
    config = deepcopy(line["config"])
    return ModelFacts(
        name=entry.meant,
        config=config,
        source=f"catalogue: {line['source']}{_meaning(entry, typed)}",
        checkpoint_dtype=checkpoint_dtype(config),
        known_params=line["params"],
        verified=line["verified"],
        hub_id=entry.meant,
        needs_remote_code=not entry.is_native,
        quantized_with=quantized_with(config),
        notes=tuple(_notes(entry, typed)),
    )


def _meaning(entry: Entry, typed: str) -> str:
    said = "" if typed.casefold() == entry.meant.casefold() else f"`{typed}` is {entry.meant}"
    shapes = "" if entry.meant == entry.id else f"the shapes of {entry.id}"
    text = ", with ".join(part for part in (said, shapes) if part)
    return f" ({text})" if text else ""


def _notes(entry: Entry, typed: str) -> Iterator[str]:
    if entry.others:
        yield f"`{typed}` is taken as {entry.meant}; it could also mean {', '.join(entry.others)}"
    if not entry.facts["verified"]:
        yield f"the catalogue's parameter count is not verified: {entry.facts['match']}"
    if entry.facts.get("unsourced_fields"):
        yield f"from memory, not from a published config: {', '.join(entry.facts['unsourced_fields'])}"
    if note := entry.facts.get("note"):
        yield note


@cache
def _lines() -> dict[str, dict[str, Any]]:
    lines: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return lines


@dataclass(frozen=True, order=True)
class _Place:
    """Where a name leads; ordered by how little it drops, then ids before aliases, then the file's order."""

    dropped: int
    is_alias: bool
    order: int
    id: str
    meant: str


@cache
def _full_names() -> dict[str, list[_Place]]:
    """`organisation/name`, in lower case → where it leads; the same alias may be listed under two ids."""
    names: dict[str, list[_Place]] = {}
    for order, (model_id, line) in enumerate(_lines().items()):
        for meant in (model_id, *line["aliases"]):
            place = _Place(0, meant != model_id, order, model_id, meant)
            names.setdefault(meant.casefold(), []).append(place)
    return names


@cache
def _short_names() -> dict[str, list[_Place]]:
    """Every key that a name without an organisation can have → where it leads, best first."""
    names: dict[str, set[_Place]] = {}
    for places in _full_names().values():
        for place in places:
            for dropped, name in enumerate(_shortened(place.meant.rpartition("/")[2])):
                names.setdefault(_key(name), set()).add(replace(place, dropped=dropped))
    return {key: sorted(places) for key, places in names.items()}


def _shortened(name: str) -> Iterator[str]:
    """The name, then the name with one part after another left out that tells variants of a size apart."""
    name = name.casefold()
    while True:
        yield name
        shorter = _VARIANT.sub("", name)
        if shorter == name and _HAS_SIZE.search(_VARIANT_OF_A_SIZE.sub("", name)):
            shorter = _VARIANT_OF_A_SIZE.sub("", name)
        if shorter == name:
            shorter = name.removeprefix("meta-")
        if shorter == name:
            return
        name = shorter


def _key(name: str) -> str:
    """One key for the spellings of a name: `Llama2-13B` and `llama-2_13b`, `phi-1_5` and `phi-1.5`."""
    name = re.sub(r"(?<=\d)_(?=\d)", ".", name.casefold())
    name = re.sub(r"[\s_-]+", "-", name)
    return re.sub(r"(?<=[a-z])-(?=\d)", "", name)
