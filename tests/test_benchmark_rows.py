"""The mapping from measured rows to requests, and the accuracy report around any engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import rows  # noqa: E402

import memplan.plan  # noqa: E402
from memplan.allocator import AllocConf  # noqa: E402
from memplan.errors import MemplanError  # noqa: E402
from memplan.request.types import Request  # noqa: E402

MEASURED = [json.loads(line) for line in (ROOT / "tests/measured/steps.jsonl").read_text().splitlines()]


def measured(case: str) -> dict[str, Any]:
    return next(row for row in MEASURED if row["id"] == case)


def test_every_row_is_a_request_or_says_what_is_missing() -> None:
    reasons = {rows.not_predicted(row) for row in MEASURED} - {None}
    assert reasons == {
        f"not predicted yet: {what}" for what in ("inference", "fsdp2", "zero1", "zero2", "zero3")
    }
    for row in MEASURED:
        if rows.not_predicted(row) is None:
            request = rows.request_of(row)
            assert request.is_quantized == (row["weights"] in ("nf4", "int8"))
            AllocConf.parse(request.alloc_conf)


def test_a_qlora_row_states_the_recipe_that_was_measured() -> None:
    request = rows.request_of(
        measured("llama-2-7b_qlora_nf4_b1_s1024_alloc_conf-expandable_segments:True_gc")
    )
    assert (request.load_in_4bit, request.load_in_8bit, request.load) == (True, False, "pretrained")
    assert (request.bnb_4bit_quant_type, request.use_bnb_nested_quant) == ("nf4", True)
    assert (request.use_peft, request.lora_r, request.lora_target_modules) == (True, 16, "all-linear")
    assert (request.per_device_train_batch_size, request.max_length) == (1, 1024)
    assert request.prepare_model_for_kbit_training is True
    assert request.gradient_checkpointing is True
    assert request.use_reentrant is False
    assert request.alloc_conf == "expandable_segments:True"
    assert request.cards[0].compute_capability == (9, 0)


def test_a_full_row_is_built_on_the_card_without_adapters() -> None:
    request = rows.request_of(measured("qwen2.5-0.5b_full_bf16_b2_s1024_snapshot-True_solo-True"))
    assert (request.use_peft, request.load, request.dtype, request.bf16) == (
        False,
        "from_config",
        "bfloat16",
        True,
    )
    assert (request.padding, request.attention_mask, request.num_processes) == ("none", True, 1)


def test_a_ddp_row_has_a_card_for_each_process() -> None:
    request = rows.request_of(measured("llama-3.2-1b_full_bf16_b2_s1024_strategy-ddp_world-4_gc"))
    assert (request.num_processes, len(request.cards)) == (4, 4)


def test_a_field_that_no_request_has_is_said_and_not_ignored() -> None:
    row = measured("qwen2.5-0.5b_full_bf16_b2_s1024_snapshot-True_solo-True") | {"neftune": 5}
    assert rows.not_predicted(row) is None
    assert rows.unread(row) == "predicted without: neftune"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that says 10 GiB for everything, and refuses eager attention."""

    def estimate(request: Request) -> Any:
        if request.attn_implementation == "eager":
            raise MemplanError("no-such-thing", "eager is not known")
        train = SimpleNamespace(allocated_bytes=10 << 30, reserved_bytes=11 << 30)
        return SimpleNamespace(ranks=[SimpleNamespace(train=train)])

    monkeypatch.setattr(memplan.plan, "estimate", estimate, raising=False)


@pytest.mark.usefixtures("engine")
def test_a_report_has_every_row_in_order_with_signed_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "accuracy.json"
    arguments = ["accuracy.py", str(ROOT / "tests/measured/steps.jsonl"), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    accuracy.main()
    report = json.loads(out.read_text())
    assert [row["id"] for row in report["rows"]] == [row["id"] for row in MEASURED]
    for row, truth in zip(report["rows"], MEASURED, strict=True):
        if row["error_reserved"] is not None:
            assert (1 + row["error_reserved"]) * truth["train_peak_reserved"] == pytest.approx(11 << 30)
        else:
            assert row["note"]
    refused = [row["note"] for row in report["rows"] if "_eager" in row["id"] or "attn-eager" in row["id"]]
    assert refused and set(refused) == {"no-such-thing: eager is not known"}
    errors = [row["error_allocated"] for row in report["rows"] if row["error_allocated"] is not None]
    assert report["summary"]["allocated"]["most_under"] == min(errors) < 0
    assert report["summary"]["allocated"]["max"] == max(map(abs, errors))
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(MEASURED) + 4


@pytest.mark.usefixtures("engine")
def test_an_out_of_memory_row_keeps_its_prediction_and_says_so() -> None:
    result = rows.predict(measured("llama-2-13b_lora_bf16_b1_s512_limit_gib-23.64_gc"))
    assert result.predicted_reserved_bytes == 11 << 30
    assert result.error_reserved is None
    assert result.note == "measured: oom under a cap of 23.64 GiB"


def test_several_processes_give_the_rows_in_order() -> None:
    chosen = [row for row in MEASURED if rows.not_predicted(row)]
    assert [result.id for result in accuracy.predict_all(chosen, jobs=2)] == [row["id"] for row in chosen]


def test_the_command_selects_rows_by_their_id() -> None:
    command = [sys.executable, ROOT / "benchmarks/accuracy.py", ROOT / "tests/measured/steps.jsonl"]
    done = subprocess.run(
        [*command, "--match", "zero1"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.count("not predicted yet: zero1") == 2
    assert "0 of 2 rows predicted" in done.stdout
