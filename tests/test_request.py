"""Defaults are the tools' own and say where from; what no tool would run is refused, all of it at once."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import ExitCode, MemplanError
from memplan.request import CardSpec, Origin, Request
from memplan.request.defaults import BITSANDBYTES_CONFIG, LORA_CONFIG, TRAINING_ARGUMENTS, resolve_defaults
from memplan.request.validate import OPTIMIZERS, UNSUPPORTED_OPTIMIZERS, length_warnings, validate

CARD = CardSpec(name="24GiB", total_bytes=24 << 30)
FLAGS = ("bf16", "fp16", "use_peft", "load_in_4bit", "load_in_8bit", "gradient_checkpointing")


def resolved(
    checkpoint_dtype: str | None = "bfloat16", position_limit: int | None = 4096, **values: Any
) -> Request:
    request = Request(model="m", **values)
    return resolve_defaults(request, checkpoint_dtype=checkpoint_dtype, position_limit=position_limit)


class TestDefaults:
    def test_nothing_stated(self) -> None:
        request = resolved()
        assert {f.name: getattr(request, f.name) for f in fields(request) if f.name != "origins"} == {
            "model": "m", "revision": None, "token": None, "trust_remote_code": False,
            "trainer": "transformers", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
            "max_length": 1024, "dtype": "bfloat16", "bf16": False, "fp16": False,
            "optim": "adamw_torch_fused", "gradient_checkpointing": False, "use_reentrant": None,
            "attn_implementation": "sdpa", "max_grad_norm": 1.0, "use_liger_kernel": False,
            "use_peft": False, "lora_r": None, "lora_alpha": None, "lora_dropout": None,
            "lora_target_modules": None, "load_in_4bit": False, "load_in_8bit": False,
            "bnb_4bit_quant_type": None, "bnb_4bit_compute_dtype": None, "bnb_4bit_quant_storage": None,
            "use_bnb_nested_quant": None, "prepare_model_for_kbit_training": None, "load": "pretrained",
            "padding": "none", "attention_mask": True, "num_processes": 1, "cards": (), "alloc_conf": None,
        }  # fmt: skip

    def test_qlora(self) -> None:
        request = resolved(use_peft=True, load_in_4bit=True, bf16=True)
        assert (request.lora_r, request.lora_alpha, request.lora_dropout) == (8, 8, 0.0)
        assert request.lora_target_modules is None
        assert request.origins["lora_target_modules"].where == "PEFT's table for the model's type, peft 0.21"
        assert (request.bnb_4bit_quant_type, request.use_bnb_nested_quant) == ("fp4", False)
        assert (request.bnb_4bit_compute_dtype, request.bnb_4bit_quant_storage) == ("bfloat16", "uint8")
        assert request.prepare_model_for_kbit_training is True

    @pytest.mark.parametrize(
        ("values", "checkpoint", "dtype", "where"),
        [
            ({}, "float16", "float16", "the checkpoint's own, as transformers 5.17 takes it"),
            ({}, None, "float32", "assumed: the checkpoint states none; torch's default"),
            ({"bf16": True}, "bfloat16", "bfloat16", "follows `--bf16`"),
            (
                {"bf16": True}, "float16", "bfloat16",
                "follows `--bf16`; transformers itself would take the checkpoint's `float16`",
            ),
            (
                {"fp16": True, "use_peft": True}, "bfloat16", "float16",
                "follows `--fp16`; transformers itself would take the checkpoint's `bfloat16`",
            ),
            (
                {"fp16": True}, "bfloat16", "float32",
                "assumed: with `--fp16` torch refuses to train float16 weights",
            ),
            ({"dtype": "float32", "bf16": True}, "float16", "float32", "stated in the request"),
        ],
    )  # fmt: skip
    def test_dtype(self, values: dict[str, Any], checkpoint: str | None, dtype: str, where: str) -> None:
        request = resolved(checkpoint, **values)
        assert request.dtype == dtype
        stated = "dtype" in values
        assert request.origins["dtype"] == Origin(value=dtype, stated=stated, where=where)

    @pytest.mark.parametrize(
        ("limit", "length", "where"),
        [
            (None, 1024, "assumed: 1024 tokens a sample"),
            (131072, 1024, "assumed: 1024 tokens a sample"),
            (512, 512, "assumed: the model's limit of 512 positions"),
        ],
    )
    def test_max_length(self, limit: int | None, length: int, where: str) -> None:
        request = resolved(position_limit=limit)
        assert request.max_length == length
        assert request.origins["max_length"].where == where

    def test_checkpointing_by_the_trainer_is_not_reentrant(self) -> None:
        request = resolved(gradient_checkpointing=True)
        assert request.use_reentrant is False
        assert (
            request.origins["use_reentrant"].where
            == "gradient_checkpointing_enable default, transformers 5.17"
        )

    def test_checkpointing_by_peft_alone_is_reentrant(self) -> None:
        request = resolved(use_peft=True, load_in_8bit=True)
        assert (request.gradient_checkpointing, request.use_reentrant) == (True, True)
        where = "`prepare_model_for_kbit_training` turns it on, peft 0.21"
        assert request.origins["gradient_checkpointing"].where == where

    def test_checkpointing_stated_off_stays_off(self) -> None:
        request = resolved(use_peft=True, load_in_8bit=True, gradient_checkpointing=False)
        assert (request.gradient_checkpointing, request.use_reentrant) == (False, None)

    def test_a_process_a_card(self) -> None:
        request = resolved(cards=(CARD,) * 3)
        assert request.num_processes == 3
        assert request.origins["num_processes"].where == "assumed: as many processes as cards"
        assert request.origins["cards"] == Origin(
            value=["24GiB"] * 3, stated=True, where="stated in the request"
        )
        assert request.origins["compute_capability"].stated is False

    def test_a_named_gpu_assumes_no_kernels(self) -> None:
        assert "compute_capability" not in resolved(cards=(replace(CARD, compute_capability=(8, 9)),)).origins

    def test_what_a_job_does_not_use_has_no_origin(self) -> None:
        unused = {"lora_r", "lora_target_modules", "bnb_4bit_quant_type", "use_reentrant"}
        assert not unused & resolved().origins.keys()

    @given(st.fixed_dictionaries({}, optional=dict.fromkeys(FLAGS, st.booleans())))
    def test_resolving_twice_changes_nothing(self, values: dict[str, bool]) -> None:
        once = resolved(**values)
        assert resolve_defaults(once, checkpoint_dtype="bfloat16", position_limit=4096) == once

    @given(
        st.fixed_dictionaries({}, optional=dict.fromkeys(FLAGS, st.booleans())),
        st.fixed_dictionaries({}, optional=dict.fromkeys(FLAGS, st.booleans())),
    )
    @settings(max_examples=200)
    def test_a_changed_job_gets_its_own_defaults(
        self, values: dict[str, bool], changes: dict[str, bool]
    ) -> None:
        def answer(request: Request) -> dict[str, Any]:
            return {f.name: getattr(request, f.name) for f in fields(request) if f.name != "origins"}

        late = resolve_defaults(
            replace(resolved(**values), **changes),  # type: ignore[arg-type]
            checkpoint_dtype="bfloat16",
            position_limit=4096,
        )
        # a change back to what was the default anyway isn't told from the default, unless it decides another
        if "gradient_checkpointing" not in changes:
            assert answer(late) == answer(resolved(**(values | changes)))

    def test_the_tables_are_those_of_the_installed_packages(self) -> None:
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        arguments = {f.name: f.default for f in fields(transformers.TrainingArguments)}
        assert {name: arguments[name] for name in TRAINING_ARGUMENTS} == TRAINING_ARGUMENTS
        lora = {f.name: f.default for f in fields(peft.LoraConfig)}
        assert {
            "lora_r": lora["r"], "lora_alpha": lora["lora_alpha"], "lora_dropout": lora["lora_dropout"],
        } == LORA_CONFIG  # fmt: skip
        assert lora["target_modules"] is None
        bnb = transformers.BitsAndBytesConfig(load_in_4bit=True)
        assert {
            "bnb_4bit_quant_type": bnb.bnb_4bit_quant_type,
            "use_bnb_nested_quant": bnb.bnb_4bit_use_double_quant,
            "bnb_4bit_quant_storage": str(bnb.bnb_4bit_quant_storage).removeprefix("torch."),
        } == BITSANDBYTES_CONFIG
        assert str(bnb.bnb_4bit_compute_dtype) == "torch.float32"
        names = {name.value for name in transformers.training_args.OptimizerNames}
        assert names == set(OPTIMIZERS) | UNSUPPORTED_OPTIMIZERS


PROBLEMS = [
    (
        {"per_device_train_batch_size": 0},
        "value-out-of-range",
        "`--per_device_train_batch_size` can't be 0",
        "`--per_device_train_batch_size` takes a whole number from 1 to 2147483647",
    ),
    (
        {"max_length": -1},
        "value-out-of-range",
        "`--max_length` can't be -1",
        "`--max_length` takes a whole number from 1 to 2147483647",
    ),
    (
        {"max_length": 10**5000},
        "value-out-of-range",
        "`--max_length` can't be a number of that size",
        "`--max_length` takes a whole number from 1 to 2147483647",
    ),
    (
        {"max_length": "512"},
        "value-out-of-range",
        "`--max_length` can't be '512'",
        "`--max_length` takes a whole number from 1 to 2147483647",
    ),
    (
        {"use_peft": True, "lora_r": 0},
        "value-out-of-range",
        "`--lora_r` can't be 0",
        "`--lora_r` takes a whole number from 1 to 2147483647",
    ),
    (
        {"use_peft": True, "lora_dropout": 1.0},
        "value-out-of-range",
        "`--lora_dropout` can't be 1.0",
        "`--lora_dropout` takes at least 0 and less than 1",
    ),
    (
        {"max_grad_norm": float("nan")},
        "value-out-of-range",
        "`--max_grad_norm` can't be nan",
        "`--max_grad_norm` takes 0, which turns clipping off, or a positive number",
    ),
    (
        {"optim": "adamw_torhc"},
        "unknown-optimizer",
        "no optimizer is called `adamw_torhc`",
        "did you mean `adamw_torch` or `adamw_torch_fused` or `adamw_8bit`?",
    ),
    (
        {"optim": "galore_adamw"},
        "optimizer-not-supported",
        "`--optim galore_adamw` is an optimizer of transformers that memplan can't run yet",
        "memplan answers for " + ", ".join(f"`{name}`" for name in OPTIMIZERS),
    ),
    (
        {"attn_implementation": "flash"},
        "unknown-attention",
        "no attention is called `flash`",
        None,
    ),
    (
        {"attn_implementation": "flash_attention"},
        "unknown-attention",
        "no attention is called `flash_attention`",
        "did you mean `flash_attention_4` or `flash_attention_3` or `flash_attention_2`?",
    ),
    (
        {"use_peft": True, "load_in_4bit": True, "bnb_4bit_quant_storage": "int4"},
        "unknown-storage-dtype",
        "no storage dtype is called `int4`",
        "did you mean `int8` or `uint8`?",
    ),
    (
        {"trainer": "trl"},
        "trainer-not-supported",
        "`--trainer trl` is not supported yet",
        "leave `--trainer` out to plan for transformers' Trainer",
    ),
    (
        {"bf16": True, "fp16": True},
        "bf16-with-fp16",
        "`--bf16` and `--fp16` exclude each other",
        "keep one: `--bf16` on Ampere or newer, `--fp16` on older cards",
    ),
    (
        {"fp16": True, "dtype": "float16"},
        "fp16-weights-with-fp16",
        "`--fp16` can't train weights of `--dtype float16`",
        "use `--dtype float32`, or `--bf16` in place of `--fp16`",
    ),
    (
        {"use_peft": True, "load_in_4bit": True, "load_in_8bit": True},
        "4bit-with-8bit",
        "`--load_in_4bit` and `--load_in_8bit` exclude each other",
        "keep one",
    ),
    (
        {"load_in_4bit": True},
        "quantized-without-peft",
        "`--load_in_4bit` needs `--use_peft`",
        "add `--use_peft`",
    ),
    (
        {"prepare_model_for_kbit_training": True},
        "prepare-without-quantization",
        "`--prepare_model_for_kbit_training` needs a quantized model",
        "add `--load_in_4bit` or `--load_in_8bit`, or leave it out",
    ),
    (
        {"use_bnb_nested_quant": True},
        "4bit-options-without-4bit",
        "`--use_bnb_nested_quant` does nothing without `--load_in_4bit`",
        "add `--load_in_4bit`, or leave it out",
    ),
    (
        {"lora_r": 16, "lora_target_modules": "all-linear"},
        "lora-without-peft",
        "`--lora_r` and `--lora_target_modules` do nothing without `--use_peft`",
        "add `--use_peft`, or leave them out",
    ),
    (
        {"use_reentrant": True},
        "reentrant-without-checkpointing",
        "`--use_reentrant` does nothing without `--gradient_checkpointing`",
        "add `--gradient_checkpointing`, or leave it out",
    ),
    (
        {"num_processes": 4, "cards": (CARD,) * 3},
        "more-processes-than-cards",
        "`--num_processes 4` is more than the cards named, 3",
        "name as many cards with `--gpus`, or use `--num_processes 3`",
    ),
]


class TestValidate:
    @pytest.mark.parametrize(("values", "reference", "message", "hint"), PROBLEMS)
    def test_one_problem(
        self, values: dict[str, Any], reference: str, message: str, hint: str | None
    ) -> None:
        with pytest.raises(MemplanError) as caught:
            validate(Request(model="m", **values))
        error = caught.value
        assert (error.reference, error.message, error.hint) == (reference, message, hint)

    def test_all_problems_at_once(self) -> None:
        with pytest.raises(MemplanError) as caught:
            validate(Request(model="m", bf16=True, fp16=True, max_length=0, lora_r=8))
        assert caught.value.to_dict() == {
            "reference": "several-problems",
            "message": "3 problems with the request",
            "context": "`value-out-of-range`: `--max_length` can't be 0\n"
            "`bf16-with-fp16`: `--bf16` and `--fp16` exclude each other\n"
            "`lora-without-peft`: `--lora_r` does nothing without `--use_peft`",
            "hint": "`--max_length` takes a whole number from 1 to 2147483647\n"
            "keep one: `--bf16` on Ampere or newer, `--fp16` on older cards\n"
            "add `--use_peft`, or leave it out",
            "note": None,
            "exit_code": 2,
        }

    @pytest.mark.parametrize(
        "values", [{"optim": "lomo"}, {"trainer": "trl"}, {"optim": "lomo", "trainer": "trl"}]
    )
    def test_a_job_that_exists_is_unknown_not_wrong(self, values: dict[str, Any]) -> None:
        with pytest.raises(MemplanError) as caught:
            validate(Request(model="m", **values))
        assert caught.value.exit_code is ExitCode.UNKNOWN

    @given(st.fixed_dictionaries({}, optional=dict.fromkeys(FLAGS, st.booleans())))
    def test_defaults_make_no_problem(self, values: dict[str, bool]) -> None:
        request = Request(model="m", cards=(CARD,), **values)  # type: ignore[arg-type]
        try:
            validate(request)
        except MemplanError:
            return
        validate(resolve_defaults(request, checkpoint_dtype="float16", position_limit=2048))

    def test_beyond_the_position_limit_is_a_warning(self) -> None:
        request = Request(model="m", max_length=8192)
        validate(request)
        assert length_warnings(request, position_limit=4096) == (
            "`--max_length 8192` is beyond the model's 4096 positions: it may train, but not well",
        )
        assert length_warnings(request, position_limit=8192) == ()
        assert length_warnings(request, position_limit=None) == ()
