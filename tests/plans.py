"""Plans made by hand, with the founding case's figures: what reports are tested with."""

from __future__ import annotations

from memplan.estimate import Alternative, Estimate, Failure, PhaseUse, Plan, RankEstimate
from memplan.request.defaults import resolve_defaults
from memplan.request.types import CardSpec, Request
from memplan.units import GIB, MIB

CARD = CardSpec(name="23.64GiB", total_bytes=round(23.64 * GIB))
VERSIONS = {"torch": "2.13.0", "transformers": "5.17.0", "peft": "0.21.0"}
CONTEXT = 804_061_184


def founding_request(**changes: object) -> Request:
    values: dict[str, object] = {
        "model": "llama-2-13b", "cards": (CARD,) * 3, "use_peft": True, "lora_target_modules": "all-linear",
        "bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 1, "max_length": 512,
    }  # fmt: skip
    return resolve_defaults(
        Request(**(values | changes)),  # type: ignore[arg-type]
        checkpoint_dtype="float16",
        position_limit=4096,
    )


def rank(number: int = 0, **changes: object) -> RankEstimate:
    values: dict[str, object] = {
        "rank": number,
        "device": "23.64GiB",
        "total_bytes": CARD.total_bytes,
        "peak_allocated_bytes": round(26.51 * GIB),
        "peak_reserved_bytes": round(27.03 * GIB),
        "reserved_range_bytes": (round(27.03 * GIB), round(27.03 * GIB)),
        "non_torch_bytes": CONTEXT,
        "phases": {
            "load": PhaseUse(allocated_bytes=round(24.25 * GIB), reserved_bytes=round(24.3 * GIB)),
            "prepare": PhaseUse(allocated_bytes=round(24.49 * GIB), reserved_bytes=round(24.55 * GIB)),
            "forward": PhaseUse(allocated_bytes=round(25.6 * GIB), reserved_bytes=round(26.2 * GIB)),
            "backward": PhaseUse(allocated_bytes=round(26.51 * GIB), reserved_bytes=round(27.03 * GIB)),
            "optimizer": PhaseUse(allocated_bytes=round(25.4 * GIB), reserved_bytes=round(27.03 * GIB)),
        },
        "train": PhaseUse(allocated_bytes=round(26.51 * GIB), reserved_bytes=round(27.03 * GIB)),
        "breakdown_bytes": {
            "parameters": round(24.24 * GIB),
            "adapters": 250 * MIB,
            "buffers": 0,
            "gradients": 120 * MIB,
            "optimizer_state": 500 * MIB,
            "activations": 800 * MIB,
            "temporaries": 300 * MIB,
            "logits_and_loss": 187 * MIB,
            "inputs": 16384,
            "workspaces": 64 * MIB,
            "communication": 250 * MIB,
            "allocator_cache": round(0.52 * GIB),
            "cuda_context": CONTEXT,
        },
        "peak_operator": "aten::_log_softmax_backward_data",
        "peak_module": "lm_head",
        "peak_phase": "backward",
        "peak_step": 1,
    }
    return RankEstimate(**(values | changes))  # type: ignore[arg-type]


def estimate(request: Request | None = None, *ranks: RankEstimate, **changes: object) -> Estimate:
    return Estimate(
        request=request or founding_request(),
        ranks=ranks or (rank(0), rank(1), rank(2)),
        versions=VERSIONS,
        **changes,  # type: ignore[arg-type]
    )


def alternative() -> Alternative:
    request = founding_request(load_in_4bit=True)
    small = {
        "peak_allocated_bytes": round(8.9 * GIB),
        "peak_reserved_bytes": round(9.47 * GIB),
        "reserved_range_bytes": (round(9.47 * GIB), round(9.52 * GIB)),
        "breakdown_bytes": {
            "parameters": round(6.9 * GIB),
            "adapters": 250 * MIB,
            "optimizer_state": 500 * MIB,
            "activations": 800 * MIB,
            "logits_and_loss": 187 * MIB,
            "allocator_cache": round(0.57 * GIB),
            "cuda_context": CONTEXT,
        },
    }
    return Alternative(
        change={"load_in_4bit": True},
        verdict="fits",
        reason="each card peaks at 9.47 GiB reserved + 0.75 GiB context, of 23.64 GiB",
        estimate=estimate(request, *(rank(number, **small) for number in range(3))),
    )


def failure() -> Failure:
    return Failure(
        rank=0,
        phase="load",
        step=-1,
        operator="aten::empty",
        module="model.layers.38.mlp.down_proj",
        requested_bytes=135 * MIB,
        allocated_bytes=round(22.8 * GIB),
        reserved_bytes=round(22.85 * GIB),
        capacity_bytes=round(22.89 * GIB),
    )


def founding_plan(**changes: object) -> Plan:
    request = founding_request()
    values: dict[str, object] = {
        "request": request,
        "verdict": "does not fit",
        "reason": "it fails while loading: each of the 3 processes puts 24.24 GiB of bfloat16 weights on its "
        "own 23.64 GiB card (data parallelism replicates the model, three cards do not add up)",
        "estimate": estimate(request),
        "failure": failure(),
        "alternatives": (alternative(),),
        "hints": ("load the base in 4 bits: add `--load_in_4bit`",),
        "origins": request.origins,
        "versions": VERSIONS,
        "seconds": 3.21,
    }
    return Plan(**(values | changes))  # type: ignore[arg-type]
