"""The same job with one thing changed, planned like the first: each figure comes from a trace, not a rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from memplan.request.types import Request

UNFRAGMENTED = "expandable_segments:True"
"""What torch's own message advises where much is reserved and unallocated."""


def changes(request: Request, *, is_fragmented: bool = False) -> Iterator[Mapping[str, Any]]:
    """What to try for a job that doesn't fit, the mildest change first.

    They keep the job's objective but for the precision of frozen weights. Where memory is enough but in
    pieces, the allocator's settings come first: the step stays as it is.
    """
    conf = request.alloc_conf or ""
    if is_fragmented and "expandable_segments" not in conf:
        yield {"alloc_conf": ",".join(filter(None, (conf, UNFRAGMENTED)))}
    four_bit: dict[str, Any] = {}
    if request.use_peft and not request.is_quantized:
        four_bit = {"load_in_4bit": True}
        yield four_bit
    if not request.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
        if four_bit:
            yield {**four_bit, "gradient_checkpointing": True}
    if (request.per_device_train_batch_size or 1) > 1:
        size = request.per_device_train_batch_size or 1
        accumulation = (request.gradient_accumulation_steps or 1) * size
        yield {
            **four_bit,
            "gradient_checkpointing": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": accumulation,
        }


def as_options(change: Mapping[str, Any]) -> str:
    """`--load_in_4bit --per_device_train_batch_size 1`; the allocator's settings as the variable they are."""
    return " ".join(_option(name, value) for name, value in change.items())


def _option(name: str, value: Any) -> str:
    if name == "alloc_conf":
        return f"PYTORCH_ALLOC_CONF={value}"
    return f"--{name}" if value is True else f"--{name} {value}"
