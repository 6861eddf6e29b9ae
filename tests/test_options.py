"""The options: every spelling that Hugging Face's tools take, and what a request is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import CARD

from memplan.cli import check
from memplan.cli.check import build_request, command
from memplan.cli.options import FIELDS, normalized, request_values
from memplan.cli.output import format_asked_for
from memplan.request import Request

OPTIONS = [
    "--revision", "--token", "--trust_remote_code", "--dtype", "--attn_implementation", "--load", "--trainer",
    "--per_device_train_batch_size", "--gradient_accumulation_steps", "--max_length", "--padding", "--bf16",
    "--fp16", "--optim", "--max_grad_norm", "--gradient_checkpointing", "--use_reentrant",
    "--use_liger_kernel", "--use_peft", "--lora_r", "--lora_alpha", "--lora_dropout",
    "--lora_target_modules", "--load_in_4bit", "--load_in_8bit", "--bnb_4bit_quant_type",
    "--bnb_4bit_compute_dtype", "--bnb_4bit_quant_storage", "--use_bnb_nested_quant",
    "--prepare_model_for_kbit_training", "--num_processes", "--alloc_conf", "--gpus", "--no_cache",
    "--format",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _three_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_cards", lambda gpus: ((CARD,) * 3, "`--gpus`"))
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)


def read(*arguments: str, model: Sequence[str] = ("m",)) -> Request:
    """The request that a command line makes."""
    given = dict(command().make_context("check", [*model, "--gpus", "3x", *arguments]).params)
    del given["format"], given["no_cache"]
    return build_request(given.pop("model"), given.pop("gpus"), given)


class TestOptions:
    def test_the_surface_is_frozen(self) -> None:
        """Scripts are written against these. To add one, add it here too; none is ever taken away."""
        parameters = [p for p in command().params if p.param_type_name == "option"]
        assert [p.opts[0] for p in parameters] == OPTIONS

    @pytest.mark.parametrize("option", OPTIONS)
    def test_both_spellings(self, option: str) -> None:
        spellings = next(p.opts for p in command().params if option in p.opts)
        assert option.replace("--", "").replace("_", "-") in [spelling[2:] for spelling in spellings]

    def test_every_field_is_one_of_the_request(self) -> None:
        assert {field.name for field in FIELDS} < {field.name for field in fields(Request)}

    def test_the_founding_command(self) -> None:
        request = read(
            "--use_peft", "--lora_target_modules", "all-linear", "--bf16", "--gradient_checkpointing",
            "--per_device_train_batch_size", "1", "--max_length", "512",
        )  # fmt: skip
        stated = {name: origin.where for name, origin in request.origins.items() if origin.stated}
        assert stated == {
            name: f"`--{name}`"
            for name in ("use_peft", "lora_target_modules", "bf16", "gradient_checkpointing",
                         "per_device_train_batch_size", "max_length")
        } | {"cards": "`--gpus`"}  # fmt: skip
        assert request.lora_target_modules == "all-linear"
        assert request.cards == (CARD,) * 3
        assert (request.bf16, request.max_length, request.fp16, request.optim) == (True, 512, None, None)

    @pytest.mark.parametrize(
        ("arguments", "value"),
        [
            (["--bf16"], True),
            (["--bf16", "True"], True),
            (["--bf16", "0"], False),
            (["--bf16=no"], False),
            (["--bf16", "FALSE"], False),
            (["--bf16", "--max-length", "8"], True),
            ([], None),
        ],
    )
    def test_booleans(self, arguments: list[str], value: bool | None) -> None:
        assert read(*arguments).bf16 is value

    def test_a_bare_boolean_leaves_the_model_alone(self) -> None:
        request = read("--use-peft", "--bf16", "llama", model=())
        assert (request.model, request.bf16) == ("llama", True)

    @pytest.mark.parametrize(
        ("arguments", "value"),
        [
            (["all-linear"], "all-linear"),
            (["q_proj"], ("q_proj",)),
            (["q_proj", "v_proj"], ("q_proj", "v_proj")),
            (["q_proj,v_proj"], ("q_proj", "v_proj")),
            (["q_proj, v_proj", "k_proj"], ("q_proj", "v_proj", "k_proj")),
        ],
    )
    def test_lists(self, arguments: list[str], value: Any) -> None:
        request = read("--use_peft", "--lora-target-modules", *arguments, "--lora-r", "4")
        assert (request.lora_target_modules, request.lora_r) == (value, 4)

    def test_a_list_may_stand_before_the_model_when_it_is_all_linear(self) -> None:
        assert read("--use_peft", "--lora_target_modules", "all-linear", "llama", model=()).model == "llama"

    def test_alloc_conf_of_the_environment_is_read_and_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "old:1")
        assert read().alloc_conf == "old:1"
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        request = read()
        assert request.alloc_conf == "expandable_segments:True"
        origin = request.origins["alloc_conf"]
        assert (origin.stated, origin.where) == (False, "PYTORCH_ALLOC_CONF of this environment")
        assert read("--alloc_conf", "backend:native").alloc_conf == "backend:native"

    def test_the_token_is_shown_nowhere(self) -> None:
        request = read("--token", "hf_secret")
        assert request.token == "hf_secret"
        assert "hf_secret" not in repr(request)
        assert "token" not in request.origins

    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "bf16": st.booleans(),
                "max_length": st.integers(),
                "lora_dropout": st.floats(allow_nan=False),
                "optim": st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1),
                "dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
                "lora_target_modules": st.lists(st.text("abc_.", min_size=1), min_size=1, max_size=4).map(
                    tuple
                ),
            },
        ),
        st.booleans(),
        st.booleans(),
    )
    def test_what_is_written_is_what_is_read(
        self, values: dict[str, Any], dashes: bool, equals: bool
    ) -> None:
        arguments = ["model"]
        for name, value in values.items():
            option = f"--{name.replace('_', '-') if dashes else name}"
            words = [*value] if isinstance(value, tuple) else [str(value)]
            arguments += [f"{option}={','.join(words)}"] if equals else [option, *words]
        context = command().make_context("check", arguments)
        read, origins = request_values(context.params)
        assert read == values
        assert origins.keys() == values.keys()
        assert context.params["model"] == "model"

    @given(st.lists(st.text(max_size=8)))
    def test_normalizing_leaves_other_words_alone(self, arguments: list[str]) -> None:
        assert normalized(["--", *arguments]) == ["--", *arguments]
        plain = [argument for argument in arguments if not argument.startswith("-")]
        assert normalized(plain) == plain

    @given(st.lists(st.sampled_from(["--format", "json", "--format=json", "quiet", "--", "human", "x"])))
    def test_the_format_is_found_before_parsing(self, arguments: list[str]) -> None:
        assert format_asked_for(arguments) in ("auto", "json", "quiet", "human")

    def test_the_last_format_wins(self) -> None:
        assert format_asked_for(["--format", "json", "--format=quiet"]) == "quiet"
        assert format_asked_for(["--format", "xml"]) == "auto"
        assert format_asked_for(["--", "--format", "json"]) == "auto"
