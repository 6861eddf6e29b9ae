"""The options of a training job: Hugging Face's names, each a field of `Request`. One table for all verbs.

Both spellings of a name are taken, `--lora_r` and `--lora-r`. A boolean stands alone or before a word as
HfArgumentParser allows, `--bf16 True`; a list takes several words, `--lora_target_modules q_proj v_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import click

from memplan.cli.output import FORMATS
from memplan.names import nearest
from memplan.request.types import Origin

DTYPES = ("bfloat16", "float16", "float32")
TRUE_WORDS = frozenset({"true", "yes", "t", "y", "1"})
FALSE_WORDS = frozenset({"false", "no", "f", "n", "0"})


@dataclass(frozen=True)
class Field:
    """An option and the field of `Request` that it sets; `type` is what its value is."""

    name: str
    type: Literal["flag", "int", "float", "text", "list"] | tuple[str, ...]
    help: str
    section: str


_TRAINING = "Training"
_MODEL = "Model"
_LORA = "LoRA"
_QUANTIZATION = "Quantization"
_MACHINE = "Machine"
SECTIONS = (_MODEL, _TRAINING, _LORA, _QUANTIZATION, _MACHINE)

FIELDS: tuple[Field, ...] = (
    Field("revision", "text", "Branch, tag or commit of the model on the hub.", _MODEL),
    Field("token", "text", "Hub token, where the saved login isn't the one.", _MODEL),
    Field("trust_remote_code", "flag", "Run model code that comes with the checkpoint.", _MODEL),
    Field("dtype", DTYPES, "Type of the weights. Follows --bf16 or --fp16, else the checkpoint's.", _MODEL),
    Field("attn_implementation", "text", "Attention, as transformers names it: sdpa, eager.", _MODEL),
    Field("load", ("pretrained", "from_config"), "How the weights get onto the card.", _MODEL),
    Field("trainer", ("transformers", "trl"), "Whose defaults and step to plan for.", _TRAINING),
    Field("per_device_train_batch_size", "int", "Samples a card and step.", _TRAINING),
    Field("gradient_accumulation_steps", "int", "Backward passes an optimizer step.", _TRAINING),
    Field("max_length", "int", "Tokens a sample.", _TRAINING),
    Field("padding", ("none", "right"), "right: batches hold shorter samples, padded.", _TRAINING),
    Field("bf16", "flag", "Mixed precision in bfloat16.", _TRAINING),
    Field("fp16", "flag", "Mixed precision in float16.", _TRAINING),
    Field("optim", "text", "Optimizer, as transformers names it.", _TRAINING),
    Field("max_grad_norm", "float", "Gradient clipping; 0 turns it off.", _TRAINING),
    Field("gradient_checkpointing", "flag", "Compute activations again in the backward pass.", _TRAINING),
    Field("use_reentrant", "flag", "The older, reentrant checkpointing.", _TRAINING),
    Field("use_liger_kernel", "flag", "Liger's fused kernels.", _TRAINING),
    Field("use_peft", "flag", "Train LoRA adapters in place of the weights.", _LORA),
    Field("lora_r", "int", "Rank of the adapters.", _LORA),
    Field("lora_alpha", "int", "Scale of the adapters.", _LORA),
    Field("lora_dropout", "float", "Dropout before the adapters.", _LORA),
    Field("lora_target_modules", "list", "all-linear, or names of modules.", _LORA),
    Field("load_in_4bit", "flag", "Keep the base in 4 bits (bitsandbytes).", _QUANTIZATION),
    Field("load_in_8bit", "flag", "Keep the base in 8 bits (bitsandbytes).", _QUANTIZATION),
    Field("bnb_4bit_quant_type", ("nf4", "fp4"), "Which 4 bits.", _QUANTIZATION),
    Field("bnb_4bit_compute_dtype", DTYPES, "Type that 4-bit layers compute in.", _QUANTIZATION),
    Field("bnb_4bit_quant_storage", "text", "Type that packed 4-bit weights are stored as.", _QUANTIZATION),
    Field("use_bnb_nested_quant", "flag", "Quantize the quantization constants too.", _QUANTIZATION),
    Field("prepare_model_for_kbit_training", "flag", "PEFT's preparation of the base.", _QUANTIZATION),
    Field("num_processes", "int", "Processes, one a card; as many as cards if left out.", _MACHINE),
    Field("alloc_conf", "text", "PYTORCH_ALLOC_CONF of the run; this environment's if left out.", _MACHINE),
)
_BY_NAME: Mapping[str, Field] = {field.name: field for field in FIELDS}
_UNRECORDED = frozenset({"token", "revision", "trust_remote_code"})
"""Which model, not what its job needs: no origin is shown for them, least of all for a secret."""


OUTPUT = "Output"
"""The section of the options that say how to answer."""


class Option(click.Option):
    """An option under both spellings, shown under the first; `section` groups it in the help."""

    def __init__(self, name: str, *, section: str, **attributes: Any) -> None:
        flag = f"--{name}"
        spellings = dict.fromkeys((flag, flag.replace("_", "-")))
        super().__init__([*spellings, name], **attributes)
        self.section = section

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The row in `--help`."""
        record = super().get_help_record(ctx)
        if record is None or len(self.opts) == 1:
            return record
        return record[0].replace(f"{self.opts[0]}, {self.opts[1]}", self.opts[0]), record[1]


def job_options(cards: str) -> list[click.Parameter]:
    """What every verb that plans a job takes: its fields, its cards, and whether to look into the cache."""
    return [
        *field_options(),
        Option("gpus", section=_MACHINE, metavar="CARDS", help=cards),
        Option("no_cache", section=OUTPUT, is_flag=True, help="Trace anew, and keep nothing."),
    ]


def format_option(quiet: str) -> Option:
    """`--format`, with what it says where it is told to be quiet."""
    choice = click.Choice(FORMATS)
    text = f"human, json, or quiet ({quiet})."
    return Option("format", section=OUTPUT, type=choice, default="auto", help=text)


def field_options() -> list[click.Parameter]:
    """The table as click options, none with a default: what isn't given stays None."""
    return [_option(field) for field in FIELDS]


def request_values(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Origin]]:
    """What was given, as fields of a `Request` and their origins."""
    values = {name: given[name] for name in _BY_NAME if given.get(name) is not None}
    origins = {
        name: Origin(value=value, stated=True, where=f"`--{name}`")
        for name, value in values.items()
        if name not in _UNRECORDED
    }
    return values, origins


def normalized(arguments: Sequence[str]) -> list[str]:
    """The arguments with HfArgumentParser's liberties made plain: `--bf16 True` becomes `--bf16=true`, and
    `--lora_target_modules q_proj v_proj` becomes `--lora_target_modules=q_proj,v_proj`.
    """
    result: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*result, argument, *rest]
        field = _BY_NAME.get(argument.removeprefix("--").replace("-", "_")) if argument[:2] == "--" else None
        if field is not None and field.type == "flag":
            is_word = bool(rest) and rest[0].lower() in TRUE_WORDS | FALSE_WORDS
            argument += f"={rest.pop(0) if is_word else 'true'}"
        elif field is not None and field.type == "list":
            argument += f"={','.join(_take_words(rest))}"
        result.append(argument)
    return result


def near_options(name: str, known: Sequence[str]) -> list[str]:
    """The options that an unknown one may have meant."""
    spelled = name.replace("-", "_").lstrip("_")
    names = sorted({option.lstrip("-").replace("-", "_") for option in known})
    near = nearest(spelled, names, 3)
    near += [other for other in names if spelled and spelled in other and other not in near][:2]
    return [f"--{match}" for match in near]


class _Flag(click.ParamType[bool]):
    name = "boolean"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word not in TRUE_WORDS | FALSE_WORDS:
            self.fail(f"`{value}` is neither `True` nor `False`", param, ctx)
        return word in TRUE_WORDS


class _Words(click.ParamType[str | tuple[str, ...]]):
    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(str(value).replace(",", " ").split())
        if not words:
            self.fail("names no module", param, ctx)
        return words[0] if words == ("all-linear",) else words


_TYPES: Mapping[str, tuple[click.ParamType[Any], str]] = {
    "flag": (_Flag(), "[BOOL]"),
    "int": (click.INT, "N"),
    "float": (click.FLOAT, "X"),
    "text": (click.STRING, "TEXT"),
    "list": (_Words(), "NAME..."),
}


def _option(field: Field) -> Option:
    if isinstance(field.type, tuple):
        return Option(field.name, section=field.section, type=click.Choice(field.type), help=field.help)
    kind, metavar = _TYPES[field.type]
    return Option(field.name, section=field.section, type=kind, metavar=metavar, help=field.help)


def _take_words(rest: list[str]) -> list[str]:
    """The words of a list: up to the next option, but `all-linear` stands alone."""
    words: list[str] = []
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
        if words == ["all-linear"]:
            break
    return words
