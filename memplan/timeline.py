"""The timeline of a step: every storage's birth and death, in order. No torch.

A `Timeline` is what `memplan.trace` makes, what the allocator replays, and what the cache keeps on disk.
Columns are plain arrays of equal length, one entry an event, so that replaying is a loop over integers.
"""

from __future__ import annotations

import json
import struct
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

FORMAT_VERSION = 1
_MAGIC = b"MEMPLAN\x00"


class Kind(IntEnum):
    """What an event does to the allocator."""

    ALLOC = 0
    FREE = 1
    EMPTY_CACHE = 2


class Category(IntEnum):
    """What a storage is for. torch's own names (torch/distributed/_tools/mem_tracker.py) where it has one."""

    PARAMETERS = 0
    ADAPTERS = 1
    BUFFERS = 2
    GRADIENTS = 3
    OPTIMIZER_STATE = 4
    ACTIVATIONS = 5
    TEMPORARIES = 6
    LOGITS_AND_LOSS = 7
    INPUTS = 8
    WORKSPACES = 9
    COMMUNICATION = 10


@dataclass(frozen=True)
class Phase:
    """A span of the job: `name` is one of load, prepare, data, forward, backward, clip, optimizer, zero_grad.

    `step` counts optimizer steps from 0 and is -1 before training.
    """

    name: str
    step: int


@dataclass
class Timeline:
    """Events in order. `storage` names what is allocated or freed; sizes are bytes as asked for, unrounded."""

    kind: array[int] = field(default_factory=lambda: array("b"))
    storage: array[int] = field(default_factory=lambda: array("i"))
    size_bytes: array[int] = field(default_factory=lambda: array("q"))
    phase: array[int] = field(default_factory=lambda: array("h"))
    operator: array[int] = field(default_factory=lambda: array("h"))
    module: array[int] = field(default_factory=lambda: array("h"))
    stream: array[int] = field(default_factory=lambda: array("b"))
    category: array[int] = field(default_factory=lambda: array("b"))
    """By storage, not by event."""

    phases: list[Phase] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What the trace learned beside the events: parameter counts, versions, notes."""

    def __len__(self) -> int:
        return len(self.kind)

    def to_bytes(self) -> bytes:
        """The timeline for a file: a JSON header, then the columns, compressed, with a checksum."""
        header = {
            "columns": {name: [column.typecode, len(column)] for name, column in self._columns().items()},
            "phases": [[p.name, p.step] for p in self.phases],
            "operators": self.operators,
            "modules": self.modules,
            "facts": self.facts,
        }
        head = json.dumps(header).encode()
        body = struct.pack("<I", len(head)) + head + b"".join(c.tobytes() for c in self._columns().values())
        return _MAGIC + struct.pack("<HI", FORMAT_VERSION, zlib.crc32(body)) + zlib.compress(body, 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Timeline:
        """The timeline of `to_bytes`. Raises `ValueError` for anything else."""
        start = len(_MAGIC) + 6
        if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
            raise ValueError("not a memplan timeline")
        version, checksum = struct.unpack("<HI", data[len(_MAGIC) : start])
        if version != FORMAT_VERSION:
            raise ValueError(f"timeline format {version}, this memplan reads {FORMAT_VERSION}")
        try:
            body = zlib.decompress(data[start:])
        except zlib.error as error:
            raise ValueError("damaged timeline") from error
        if zlib.crc32(body) != checksum:
            raise ValueError("damaged timeline")
        (length,) = struct.unpack("<I", body[:4])
        header: Mapping[str, Any] = json.loads(body[4 : 4 + length])
        timeline = cls(
            phases=[Phase(name, step) for name, step in header["phases"]],
            operators=header["operators"],
            modules=header["modules"],
            facts=header["facts"],
        )
        offset = 4 + length
        for name, (typecode, count) in header["columns"].items():
            column = array(typecode)
            end = offset + count * column.itemsize
            column.frombytes(body[offset:end])
            setattr(timeline, name, column)
            offset = end
        return timeline

    def _columns(self) -> dict[str, array[int]]:
        return {
            "kind": self.kind,
            "storage": self.storage,
            "size_bytes": self.size_bytes,
            "phase": self.phase,
            "operator": self.operator,
            "module": self.module,
            "stream": self.stream,
            "category": self.category,
        }
