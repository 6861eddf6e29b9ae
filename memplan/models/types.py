"""What is true of a model before anything is built. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model's config and what is known beside it, with where it was read."""

    name: str
    """As the user wrote it, or the catalogue's id."""
    config: Mapping[str, Any]
    """The fields of `config.json`."""
    source: str
    """Where the config was read: a path, `huggingface.co/ID@REVISION`, or `catalogue: SOURCE`."""
    checkpoint_dtype: str | None = None
    """`bfloat16`, `float16` or `float32` as the config or the safetensors headers state it."""
    known_params: int | None = None
    """For a catalogue entry: its parameters as transformers builds it."""
    verified: bool | None = None
    """For a catalogue entry: whether its parameter count was checked against a published one."""
    local_dir: Path | None = None
    """The directory whose code and files belong to the config, where there is one."""
    hub_id: str | None = None
    """The repository of the config, where there is one, and the commit in `revision` that was read."""
    revision: str | None = None
    needs_remote_code: bool = False
    """Whether the config names code of its own (`auto_map`), or the catalogue knows that it needs some."""
    quantized_with: str | None = None
    """The method of a checkpoint that is stored quantized (`gptq`, `awq`, `fp8`, …)."""
    notes: tuple[str, ...] = ()
