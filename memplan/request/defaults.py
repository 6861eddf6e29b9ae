"""What a job does where its author chose nothing: the tools' own defaults, each with where it comes from.

Read from the source of transformers 5.17, peft 0.21 and torch 2.13; tests/test_request.py compares the
figures with the packages that are installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from memplan.request.types import Origin, Request

STATED = "stated in the request"
ASSUMED_LENGTH = 1024
"""Tokens a sample where nothing is stated; TRL's default for `max_length`."""

_ARGUMENTS = "TrainingArguments default, transformers 5.17"
_LORA = "LoraConfig default, peft 0.21"
_BNB = "BitsAndBytesConfig default, transformers 5.17"

TRAINING_ARGUMENTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "bf16": False,
    "fp16": False,
    "optim": "adamw_torch_fused",  # since torch 2.8, which is older than any torch that memplan takes
    "max_grad_norm": 1.0,
    "use_liger_kernel": False,
}
LORA_CONFIG: Mapping[str, Any] = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
BITSANDBYTES_CONFIG: Mapping[str, Any] = {
    "bnb_4bit_quant_type": "fp4",
    "use_bnb_nested_quant": False,
    "bnb_4bit_quant_storage": "uint8",
}
_FILLED = {field.name for field in fields(Request) if field.default is None} - {
    "revision",
    "token",
    "alloc_conf",
}
"""The fields that a resolution fills."""


def resolve_defaults(
    request: Request, *, checkpoint_dtype: str | None, position_limit: int | None
) -> Request:
    """The request with every field chosen that its job uses, and an `Origin` for each that moves the answer.

    A field that the job doesn't use stays None: LoRA's without PEFT, 4-bit's without 4-bit. Resolving again
    after `dataclasses.replace` chooses anew what was never stated, so a changed job gets its own defaults.
    """
    choices = _Choices(_as_stated(request))
    for name in TRAINING_ARGUMENTS:
        choices.take(name, TRAINING_ARGUMENTS[name], _ARGUMENTS)
    choices.take("use_peft", False, "assumed: every weight is trained")
    choices.take("load_in_4bit", False, _BNB)
    choices.take("load_in_8bit", False, _BNB)
    _choose_dtype(choices, checkpoint_dtype)
    _choose_quantization(choices)
    _choose_checkpointing(choices)
    _choose_adapters(choices)
    _choose_data(choices, position_limit)
    _choose_machine(choices)
    return replace(choices.asked, origins=choices.origins, **choices.values)


@dataclass
class _Choices:
    """Values and origins as they are settled, field by field; later ones may look at earlier ones."""

    asked: Request
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def take(self, name: str, default: Any, where: str) -> Any:
        """Settle a field: what was stated, else the default."""
        value = getattr(self.asked, name)
        origin = Origin(value=value, stated=True, where=STATED)
        known = self.asked.origins.get(name)
        if value is None:
            value, origin = default, Origin(value=default, stated=False, where=where)
        elif known is not None and known.value == value:
            origin = known
        self.values[name], self.origins[name] = value, origin
        return value

    def is_on(self, name: str) -> bool:
        """Whether a field settled before is true."""
        return bool(self.values.get(name))


def _as_stated(request: Request) -> Request:
    """The request without the defaults that an earlier resolution filled in and nobody has changed since."""
    unstated: dict[str, Any] = {
        name: None
        for name, origin in request.origins.items()
        if name in _FILLED and not origin.stated and getattr(request, name) == origin.value
    }
    return replace(request, **unstated)


def _choose_dtype(choices: _Choices, checkpoint_dtype: str | None) -> None:
    """The dtype of the weights. Mixed precision is asked for with the weights in mind, so they follow it."""
    flag, follows = ("bf16", "bfloat16") if choices.is_on("bf16") else ("fp16", "float16")
    if not choices.is_on(flag):
        where = "the checkpoint's own, as transformers 5.17 takes it"
        if checkpoint_dtype is None:
            where = "assumed: the checkpoint states none; torch's default"
        choices.take("dtype", checkpoint_dtype or "float32", where)
        return
    if flag == "fp16" and not choices.is_on("use_peft"):
        # torch/amp/grad_scaler.py refuses float16 gradients, so the weights that train are float32
        choices.take("dtype", "float32", "assumed: with `--fp16` torch refuses to train float16 weights")
        return
    where = f"follows `--{flag}`"
    if checkpoint_dtype is not None and checkpoint_dtype != follows:
        where += f"; transformers itself would take the checkpoint's `{checkpoint_dtype}`"
    choices.take("dtype", follows, where)


def _choose_quantization(choices: _Choices) -> None:
    is_quantized = choices.is_on("load_in_4bit") or choices.is_on("load_in_8bit")
    if choices.is_on("load_in_4bit"):
        for name, default in BITSANDBYTES_CONFIG.items():
            choices.take(name, default, _BNB)
        compute, where = "float32", _BNB
        for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            if choices.is_on(flag):
                compute, where = dtype, f"follows `--{flag}`; BitsAndBytesConfig itself would take `float32`"
        choices.take("bnb_4bit_compute_dtype", compute, where)
    if is_quantized and choices.is_on("use_peft"):
        choices.take("prepare_model_for_kbit_training", True, "PEFT's documented recipe for a quantized base")


def _choose_checkpointing(choices: _Choices) -> None:
    by_peft = choices.asked.gradient_checkpointing is None and choices.is_on(
        "prepare_model_for_kbit_training"
    )
    default, where = False, _ARGUMENTS
    if by_peft:
        default, where = True, "`prepare_model_for_kbit_training` turns it on, peft 0.21"
    if not choices.take("gradient_checkpointing", default, where):
        return
    if by_peft:
        # peft passes empty kwargs and so leaves the choice to torch/utils/checkpoint.py
        choices.take(
            "use_reentrant", True, "torch's default, since `prepare_model_for_kbit_training` names none"
        )
    else:
        choices.take("use_reentrant", False, "gradient_checkpointing_enable default, transformers 5.17")


def _choose_adapters(choices: _Choices) -> None:
    if not choices.is_on("use_peft"):
        return
    for name, default in LORA_CONFIG.items():
        choices.take(name, default, _LORA)
    choices.take("lora_target_modules", None, "PEFT's table for the model's type, peft 0.21")


def _choose_data(choices: _Choices, position_limit: int | None) -> None:
    length, where = ASSUMED_LENGTH, f"assumed: {ASSUMED_LENGTH} tokens a sample"
    if position_limit is not None and position_limit < length:
        length, where = position_limit, f"assumed: the model's limit of {position_limit} positions"
    choices.take("max_length", length, where)
    choices.take("padding", "none", "assumed: all samples fill `--max_length`")
    choices.take("attention_mask", True, "Hugging Face's collators pass one")
    choices.take("load", "pretrained", "assumed: `from_pretrained` straight onto the card")
    choices.take("attn_implementation", "sdpa", "transformers' own choice, 5.17")
    if choices.asked.trainer == "transformers" and "trainer" not in choices.asked.origins:
        choices.origins["trainer"] = Origin(value="transformers", stated=False, where="memplan's default")
    else:
        choices.take("trainer", None, "")


def _choose_machine(choices: _Choices) -> None:
    cards = choices.asked.cards
    where = "assumed: as many processes as cards" if cards else "assumed: one process, as no card is named"
    if choices.take("num_processes", len(cards) or 1, where) > 1:
        # a PeftModel is no PreTrainedModel, so the Trainer doesn't look whether it checkpoints
        finds_unused = choices.is_on("use_peft") or not choices.is_on("gradient_checkpointing")
        choices.take("ddp_find_unused_parameters", finds_unused, "the Trainer's rule, transformers 5.17")
    choices.take("alloc_conf", None, "torch's own, as no PYTORCH_ALLOC_CONF is set")
    names = [card.name for card in cards]
    known = choices.asked.origins.get("cards")
    if known is None or known.value != names:
        known = Origin(value=names, stated=bool(cards), where=STATED if cards else "none named")
    choices.origins["cards"] = known
    if any(card.compute_capability is None for card in cards):
        choices.origins["compute_capability"] = Origin(
            value="9.0", stated=False, where="assumed: a size names no GPU, so an H100's kernels are taken"
        )
