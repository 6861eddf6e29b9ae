"""From a measured row to the request that describes it, and the prediction for that request.

The rows' fields are explained in the README beside the measurements; `tests/measured/*.jsonl` hold them. A
row with `passes_at_mib` is of a boundary: the least memory cap under which the steps passed, and the largest
under which they failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError
from memplan.request.types import CardSpec, Request
from memplan.units import GIB, MIB

Row = Mapping[str, Any]

CONFIGS = Path(__file__).parents[1] / "tests" / "measured" / "configs.json"
"""The configs of the models that rows name."""

H100_BYTES = 85_017_493_504
"""What torch saw of the card that the rows were measured on."""
_QUANTIZED = {"nf4", "fp4", "int8"}
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_MAPPED = {
    "model", "config", "method", "weights", "batch", "seq", "accum", "optim", "attn", "grad_ckpt",
    "reentrant", "pad", "mask", "max_grad_norm", "bf16", "prep_kbit", "alloc_conf", "load", "strategy",
    "world", "limit_gib", "lora_r", "lora_targets", "lora_dropout", "double_quant", "quant_storage",
    "liger",
}  # fmt: skip
_NEUTRAL = {
    "id", "gpu", "driver", "versions", "total_bytes", "params", "trainable", "trainable_dtype", "marks",
    "status", "error", "traceback", "stats_error", "peak_allocated", "peak_reserved",
    "train_peak_allocated", "train_peak_reserved", "load_peak_allocated", "device_used_bytes",
    "seconds", "step_seconds", "steps", "solo", "snapshot", "need_gib", "fails_at_mib", "passes_at_mib",
    "trials", "runs", "predicted_boundary_bytes", "predicted_range_bytes", "is_as_predicted", "seed",
    "real_gpus", "note",
}  # fmt: skip
"""What was measured, and how: nothing that a request says."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row's prediction beside its measurement; bytes, and errors as `predicted / measured - 1`.

    `note` says why something is missing. `seconds` is the whole prediction; in a process's first row it
    holds the imports too.
    """

    id: str
    predicted_allocated_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    measured_allocated_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    error_allocated: float | None = None
    error_reserved: float | None = None
    predicted_boundary_bytes: int | None = None
    measured_boundary_bytes: tuple[int, int] | None = None
    """The largest cap that failed and the least that passed."""
    error_boundary: float | None = None
    """Signed relative distance to the nearer of the two; 0 between them."""
    seconds: float | None = None
    note: str | None = None


def request_of(row: Row) -> Request:
    """The request that a row's case states. Call `not_predicted` first."""
    quantized = row["weights"] in _QUANTIZED
    four_bit = row["weights"] in ("nf4", "fp4")
    processes = row.get("world", 1)
    return Request(
        model=row.get("config") or _configs()[row["model"]],
        per_device_train_batch_size=row["batch"],
        gradient_accumulation_steps=row.get("accum", 1),
        max_length=row["seq"],
        dtype="float32" if row["weights"] == "fp32" else "bfloat16",
        bf16=row.get("bf16", True),
        optim=row["optim"],
        gradient_checkpointing=row["grad_ckpt"],
        use_reentrant=row.get("reentrant", False),
        attn_implementation=row["attn"],
        max_grad_norm=row.get("max_grad_norm", 1.0),
        use_liger_kernel=row.get("liger", False),
        load="pretrained" if quantized or row.get("load") == "pretrained" else "from_config",
        padding="right" if row.get("pad") else "none",
        attention_mask=row.get("mask", True),
        num_processes=processes,
        ddp_find_unused_parameters=False if processes > 1 else None,  # as measure.py sets it
        cards=(_card(row),) * processes,
        alloc_conf=row.get("alloc_conf"),
        load_in_4bit=four_bit,
        load_in_8bit=quantized and not four_bit,
        prepare_model_for_kbit_training=quantized and row.get("prep_kbit", True),
        **(_four_bit(row) if four_bit else {}),
        **_lora(row),
    )


@cache
def _configs() -> dict[str, Any]:
    configs: dict[str, Any] = json.loads(CONFIGS.read_text())
    return configs


def _card(row: Row) -> CardSpec:
    """The card as torch saw it; a cap counts only where the run hit it."""
    capped = row.get("status") == "oom" and row.get("limit_gib")
    return CardSpec(
        name="H100",
        total_bytes=int(row["limit_gib"] * GIB) if capped else row.get("total_bytes", H100_BYTES),
        compute_capability=(9, 0),
        multiprocessor_count=132,
    )


def _four_bit(row: Row) -> dict[str, Any]:
    storage = row.get("quant_storage")
    return {
        "bnb_4bit_quant_type": row["weights"],
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": _DTYPES.get(storage, storage) if storage else None,
        "use_bnb_nested_quant": row.get("double_quant", True),
    }


def _lora(row: Row) -> dict[str, Any]:
    if row["method"] not in ("lora", "qlora"):
        return {"use_peft": False}
    targets = row.get("lora_targets", "all-linear")
    return {
        "use_peft": True,
        "lora_r": row.get("lora_r", 16),
        "lora_alpha": 32,
        "lora_dropout": row.get("lora_dropout", 0.0),
        "lora_target_modules": targets if isinstance(targets, str) else tuple(targets),
    }


def not_predicted(row: Row) -> str | None:
    """Why a request cannot describe the row; None where it can."""
    if row["method"] == "inference":
        return "not predicted yet: inference"
    if row.get("strategy", "ddp") != "ddp":
        return f"not predicted yet: {row['strategy']}"
    return None


def unread(row: Row) -> str | None:
    """The fields that no request has, as a note: the prediction goes without them."""
    unknown = sorted(key for key in row.keys() - _MAPPED - _NEUTRAL if row[key])
    return f"predicted without: {', '.join(unknown)}" if unknown else None


def predict(row: Row) -> Result:
    """The row's result. Never raises: what goes wrong is the note, so that no row is left out."""
    result = _measured(row)
    why_not = not_predicted(row)
    if why_not:
        return _noted(result, why_not)
    began = time.perf_counter()
    try:
        predicted = _boundary(row, result) if is_boundary(row) else _peaks(row, result)
    except MemplanError as error:
        return _noted(result, f"{error.reference}: {error.message}")
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        return _noted(result, f"failed: {type(error).__name__}: {text}")
    without = unread(row)
    if without:
        predicted = _noted(predicted, without)
    return replace(predicted, seconds=round(time.perf_counter() - began, 3))


def is_boundary(row: Row) -> bool:
    """Whether the row says under which memory cap its job passes."""
    return "passes_at_mib" in row


def _peaks(row: Row, result: Result) -> Result:
    # Here, so that reading rows needs no engine and each process imports it once.
    from memplan.plan import estimate

    train = estimate(request_of(row)).ranks[0].train
    return replace(
        result,
        predicted_allocated_bytes=train.allocated_bytes,
        predicted_reserved_bytes=train.reserved_bytes,
        error_allocated=_error(train.allocated_bytes, result.measured_allocated_bytes),
        error_reserved=_error(train.reserved_bytes, result.measured_reserved_bytes),
    )


def _boundary(row: Row, result: Result) -> Result:
    from memplan.plan import boundary

    predicted = boundary(request_of(row)).passes_at_bytes
    fails, passes = row["fails_at_mib"] * MIB, row["passes_at_mib"] * MIB
    return replace(
        result,
        predicted_boundary_bytes=predicted,
        error_boundary=distance(predicted, fails, passes),
    )


def distance(predicted: float, fails: float, passes: float) -> float:
    """How far a boundary lies outside the measured interval, relative to its nearer end."""
    if predicted < fails:
        return predicted / fails - 1
    return max(predicted / passes - 1, 0.0)


def _measured(row: Row) -> Result:
    """What was measured. The peaks of a run that ran out of memory are not those of its steps."""
    if is_boundary(row):
        ends = round(row["fails_at_mib"] * MIB), round(row["passes_at_mib"] * MIB)
        return Result(id=row["id"], measured_boundary_bytes=ends)
    if row.get("status", "ok") != "ok":
        cap = f" under a cap of {row['limit_gib']} GiB" if row.get("limit_gib") else ""
        return Result(id=row["id"], note=f"measured: {row['status']}{cap}")
    peak = row.get("train_peak_reserved")
    return Result(
        id=row["id"],
        measured_allocated_bytes=row.get("train_peak_allocated"),
        measured_reserved_bytes=peak,
        note=None if peak else "no measured peaks",
    )


def _noted(result: Result, note: str) -> Result:
    return replace(result, note=f"{result.note}; {note}" if result.note else note)


def _error(predicted: int, measured: int | None) -> float | None:
    return predicted / measured - 1 if measured else None
