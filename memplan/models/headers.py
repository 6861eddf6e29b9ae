"""The dtype of a checkpoint on disk, from the header of one safetensors file; the weights are not read."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

MAX_HEADER_BYTES = 16 << 20
"""Headers of one shard stay below 2 MiB for the largest models; the format itself allows 100 MB."""
MAX_INDEX_BYTES = 64 << 20

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def directory_dtype(directory: Path) -> str | None:
    """The dtype that transformers loads a directory's safetensors checkpoint in when its config states none.

    That is the first floating tensor's, by name, in the first shard (transformers' `get_state_dict_dtype`);
    float8 is passed over. None without a safetensors checkpoint, or for a header that can't be read.
    """
    file = first_shard(directory)
    header = read_header(file) if file else None
    return None if header is None else first_dtype(header)


def first_dtype(dtypes: Mapping[str, str]) -> str | None:
    """Of tensor names → safetensors dtypes: the first floating one that a model can be loaded in."""
    return next((known for name in sorted(dtypes) if (known := _DTYPES.get(dtypes[name]))), None)


def first_shard(directory: Path) -> Path | None:
    """The checkpoint's first safetensors file, by its index where there is one."""
    whole = directory / "model.safetensors"
    if whole.is_file():
        return whole
    shards = index_shards(directory / "model.safetensors.index.json")
    return next((directory / name for name in shards if (directory / name).is_file()), None)


def index_shards(index: Path) -> list[str]:
    """The file names in a safetensors index, sorted; none for an index that is missing or can't be read."""
    try:
        with index.open("rb") as file:
            raw = file.read(MAX_INDEX_BYTES + 1)
        weight_map = json.loads(raw)["weight_map"] if len(raw) <= MAX_INDEX_BYTES else {}
        names = {name for name in weight_map.values() if isinstance(name, str)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(name for name in names if name.endswith(".safetensors") and Path(name).name == name)


def read_header(file: Path) -> dict[str, str] | None:
    """Tensor name → dtype of a safetensors file; None for one whose header is no such thing."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            raw = stream.read(length) if length <= MAX_HEADER_BYTES else b""
        header = json.loads(raw)
        return {name: tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return None
