"""Traces against what an H100 measured: peaks row by row, and every allocation of three whole histories."""

from __future__ import annotations

import difflib
import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rows import predict, request_of
from memplan.allocator import replay
from memplan.errors import ExitCode, MemplanError
from memplan.models.types import ModelFacts
from memplan.request.defaults import resolve_defaults
from memplan.request.types import Request
from memplan.timeline import Category, Kind, Timeline
from memplan.trace.job import trace_job

MEASURED = Path(__file__).parent / "measured"
ROWS = {
    row["id"]: row
    for name in ("steps.jsonl", "steps_2.jsonl")
    for row in map(json.loads, (MEASURED / name).read_text().splitlines())
}
# One of each kind: method, optimizer, attention, padding, accumulation, precision, several processes.
SHOWN = [
    "qwen2.5-0.5b_full_bf16_b8_s512_grad_ckpt-False",
    "qwen2.5-0.5b_full_bf16_b1_s512_optim-adafactor",
    "qwen2.5-0.5b_full_bf16_b1_s1024_attn-eager",
    "qwen2.5-0.5b_full_bf16_b4_s1000_pad-True",
    "qwen2.5-0.5b_full_fp32_b1_s1024",
    "qwen2.5-0.5b_full_bf16_b2_s1024_reentrant-True_gc",
    "qwen2.5-1.5b_full_bf16_b2_s1024_alloc_conf-expandable_segments:True_gc",
    "tinyllama-1.1b_full_bf16_b5_s1234_accum-2_optim-paged_adamw_8bit_gc",
    "phi-3-mini_full_bf16_b1_s1100_optim-adamw_bnb_8bit_gc",
    "mixtral-small_qlora_nf4_b2_s1024_gc",
    "llama-2-7b_qlora_nf4_b1_s1024_lora_r-64_gc",
    "llama-2-7b_lora_int8_b1_s512",
    "llama-2-13b_qlora_nf4_b1_s512_strategy-ddp_world-3_gc",
    "37_qwen3-moe-tiny_full_bf16_b2_s1024_gc_",
    "15_gemma-3-1b_full_bf16_b2_s1024_gc_",
    "11_smollm3-3b_lora_bf16_b1_s1500_gc_",
]
HISTORIES = [
    "qwen2.5-0.5b_full_bf16_b2_s1024_snapshot-True_solo-True",
    "37_qwen3-moe-tiny_full_bf16_b2_s1024_gc_",
    "opt-1.3b_full_fp32_b3_s700",
]
SMALL = {
    "llama": {"num_hidden_layers": 9, "num_key_value_heads": 2},
    "gemma3_text": {"num_hidden_layers": 26, "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 128},
    "smollm3": {"num_hidden_layers": 20, "num_key_value_heads": 2, "no_rope_layer_interval": 4, "pad_token_id": 1},
    "qwen3_moe": {
        "num_hidden_layers": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "num_key_value_heads": 2, "head_dim": 64,
    },
    "gpt_neox": {"num_hidden_layers": 8},
}  # fmt: skip


def facts(model_type: str, **fields: Any) -> ModelFacts:
    config = {
        "model_type": model_type,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "vocab_size": 1000,
        **SMALL.get(model_type, {"num_hidden_layers": 6}),
        **fields,
    }
    return ModelFacts(name=f"a small {model_type}", config=config, source="this test")


def request(**stated: Any) -> Request:
    asked = Request(
        model="small", **{"per_device_train_batch_size": 2, "max_length": 256, "dtype": "bfloat16", **stated}
    )
    return resolve_defaults(asked, checkpoint_dtype="bfloat16", position_limit=None)


@pytest.mark.parametrize("name", SHOWN)
def test_a_measured_row_is_predicted(name: str) -> None:
    result = predict(ROWS[name])
    assert result.note is None
    assert result.error_allocated == pytest.approx(0, abs=0.001)
    assert result.error_reserved == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize("name", HISTORIES)
def test_allocations_come_in_the_order_and_the_sizes_of_the_real_run(name: str) -> None:
    row = ROWS[name]
    asked = resolve_defaults(request_of(row), checkpoint_dtype="bfloat16", position_limit=None)
    timeline = trace_job(
        asked, ModelFacts(name=name, config=row["config"], source="measured"), asked.cards[0]
    )
    with gzip.open(next((MEASURED / "events").glob(f"{name}*")), "rt") as file:
        history = json.load(file)[0]
    real = [_rounded(size) for action, _, size in history if action == "alloc"]
    ours = [
        _rounded(size)
        for kind, size in zip(timeline.kind, timeline.size_bytes, strict=True)
        if kind == Kind.ALLOC
    ]
    matcher = difflib.SequenceMatcher(None, ours, real, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    assert same / len(real) >= 0.998
    missing, made_up = Counter(real) - Counter(ours), Counter(ours) - Counter(real)
    assert max([*missing, *made_up], default=0) <= 1024


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // 512) * 512


JOBS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
    "full, reentrant": {"gradient_checkpointing": True, "use_reentrant": True},
    "bf16, padded": {"bf16": True, "padding": "right"},
    "accumulation": {"bf16": True, "gradient_accumulation_steps": 2},
    "lora": {"bf16": True, "use_peft": True, "lora_target_modules": "all-linear"},
    "qlora": {
        "bf16": True, "use_peft": True, "lora_target_modules": "all-linear", "load_in_4bit": True,
        "gradient_checkpointing": True, "use_reentrant": False,
    },
    "ddp": {"num_processes": 2, "bf16": True},
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "smollm3"])
def test_skipping_layers_changes_nothing(model_type: str, job: str) -> None:
    model, asked = facts(model_type), request(**JOBS[job])
    short = trace_job(asked, model, None)
    full = trace_job(asked, model, None, skip_layers=False)
    assert sorted(_events(short)) == sorted(_events(full))
    one, other = replay(short), replay(full)
    assert one.peak_allocated_bytes == other.peak_allocated_bytes
    assert one.peak_reserved_bytes == other.peak_reserved_bytes
    if "depth" not in short.facts:  # it says why where the layers don't line up, and every layer ran
        assert short.facts["operators"] < full.facts["operators"]


def _events(timeline: Timeline) -> list[tuple[int, int, int]]:
    return list(zip(timeline.kind, timeline.size_bytes, timeline.phase, strict=True))


@pytest.mark.parametrize("model_type", SMALL)
def test_every_storage_is_born_once_and_dies_at_most_once(model_type: str) -> None:
    timeline = trace_job(request(gradient_checkpointing=True, bf16=True), facts(model_type), None)
    born: set[int] = set()
    alive: set[int] = set()
    for kind, storage in zip(timeline.kind, timeline.storage, strict=True):
        if kind == Kind.ALLOC:
            assert storage not in born
            born.add(storage)
            alive.add(storage)
        elif kind == Kind.FREE:
            alive.remove(storage)
    held = {Category(timeline.category[storage]) for storage in alive}
    assert held <= {
        Category.PARAMETERS, Category.BUFFERS, Category.OPTIMIZER_STATE, Category.INPUTS,
        Category.WORKSPACES, Category.TEMPORARIES,
    }  # fmt: skip


def test_categories_add_up_to_what_they_are() -> None:
    timeline = trace_job(request(), facts("llama", tie_word_embeddings=False), None)
    count = timeline.facts["parameters"]
    sums: dict[Category, int] = {}
    for kind, storage, size in zip(timeline.kind, timeline.storage, timeline.size_bytes, strict=True):
        if kind == Kind.ALLOC:
            category = Category(timeline.category[storage])
            sums[category] = sums.get(category, 0) + size
    assert sums[Category.PARAMETERS] == 2 * count
    assert sums[Category.GRADIENTS] == 3 * 2 * count  # three steps
    assert sums[Category.OPTIMIZER_STATE] >= 2 * 2 * count  # two moments, and a step count a tensor
    assert sums[Category.OPTIMIZER_STATE] < 2 * 2 * count + 8 * 1000


def test_nothing_stays_patched() -> None:
    import torch
    import torch.nn.functional as F

    before = (F.scaled_dot_product_attention, F.dropout, torch.is_autocast_enabled, torch.cuda.is_available)
    trace_job(request(bf16=True), facts("llama"), None)
    with pytest.raises(MemplanError):
        trace_job(request(use_peft=True, lora_target_modules=("nothing",)), facts("llama"), None)
    after = (F.scaled_dot_product_attention, F.dropout, torch.is_autocast_enabled, torch.cuda.is_available)
    assert after == before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.bfloat16
    assert product.tolist() == [[2, 2], [2, 2]]


def test_lora_targets_that_match_nothing_are_listed() -> None:
    asked = request(use_peft=True, lora_target_modules=("query", "value"))
    with pytest.raises(MemplanError) as caught:
        trace_job(asked, facts("llama"), None)
    error = caught.value
    assert error.reference == "lora-targets-unmatched"
    assert error.message == "PEFT finds nothing to adapt for `--lora_target_modules query value`"
    assert error.hint == (
        "this model's linear layers: `down_proj`, `gate_proj`, `k_proj`, `lm_head`, `o_proj`, `q_proj`,"
        " `up_proj`, `v_proj`"
    )
    assert error.exit_code is ExitCode.BAD_INPUT


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(MemplanError) as caught:
        trace_job(request(), facts("llamma"), None)
    assert caught.value.reference == "unknown-model-type"
    assert caught.value.message == "the config of `a small llamma` has model_type `llamma`"
    assert "`llama`" in (caught.value.hint or "")


def test_a_model_that_needs_data_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def needs_data(self: Any, hidden: Any) -> Any:
        return hidden.nonzero()[0]

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", needs_data)
    with pytest.raises(MemplanError) as caught:
        trace_job(request(), facts("llama"), None)
    assert caught.value.reference == "not-traceable"
    assert caught.value.exit_code is ExitCode.UNKNOWN
    assert "aten::nonzero" in (caught.value.context or "") or "nonzero" in (caught.value.context or "")


def test_other_cards_have_other_kernels() -> None:
    from memplan.request.types import CardSpec

    asked = request(bf16=True)
    ampere = CardSpec(name="an Ampere", total_bytes=24 << 30, compute_capability=(8, 6))
    hopper = replace(ampere, compute_capability=(9, 0))
    attention = {
        card.compute_capability: {
            o for o in trace_job(asked, facts("llama"), card).operators if "attention" in o
        }
        for card in (ampere, hopper)
    }
    assert attention[8, 6] == {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_backward",
    }
    assert attention[9, 0] == {
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_cudnn_attention_backward",
    }


def test_a_timeline_is_of_any_card_with_the_same_kernels() -> None:
    """The cache keeps one for all of them; what a card's size changes is for the replay."""
    from memplan.plan.ranks import WARMUP, on_card
    from memplan.request.types import CardSpec
    from memplan.trace.cache import cache_key

    asked, model = request(load="pretrained"), facts("llama")
    small = CardSpec(name="small", total_bytes=1_300_000_000, compute_capability=(9, 0))
    large = replace(small, name="large", total_bytes=80 << 30)
    assert cache_key(asked, model, small) == cache_key(asked, model, large)
    traced = trace_job(asked, model, small)
    assert traced.to_bytes() == trace_job(asked, model, large).to_bytes()
    first = traced.operator.index(traced.operators.index(WARMUP))
    blocks = [on_card(traced, card.total_bytes).size_bytes[first] for card in (small, large)]
    assert blocks == [1_300_000_000 - int(1.2 * (1 << 30)), traced.facts["weight_bytes"]]
