"""What no job can be: checked before anything is read or built, all problems at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from memplan.errors import ExitCode, MemplanError
from memplan.names import listed, nearest, printable
from memplan.request.types import Request

OPTIMIZERS: tuple[str, ...] = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop",
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip
"""`--optim` as transformers names it, where memplan can run it on the meta device."""

UNSUPPORTED_OPTIMIZERS: frozenset[str] = frozenset(
    {
        "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "adamw_torch_4bit",
        "adamw_torch_8bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
        "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo",
        "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd",
        "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
    }
)  # fmt: skip
"""The rest of transformers' OptimizerNames, 5.17: jobs that exist and that memplan can't answer for."""

ATTENTION: tuple[str, ...] = (
    "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention",
)  # fmt: skip
"""transformers' AttentionInterface, 5.17, for training."""

QUANT_STORAGE: tuple[str, ...] = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
"""What BitsAndBytesConfig takes, transformers 5.17."""

_COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_processes")
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
_FOUR_BIT = (
    "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "use_bnb_nested_quant",
)  # fmt: skip
_LARGEST = 2**31 - 1
"""No size is larger: torch's own indices of a dimension in a CUDA kernel end there."""


def validate(request: Request) -> None:
    """Raise a `MemplanError` for a request that no tool would run, or that memplan can't answer.

    Several problems become one error whose context lists them, so that they are mended in one go.
    """
    problems = [problem for rule in _RULES for problem in rule(request)]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise _together(problems)


def length_warnings(request: Request, *, position_limit: int | None) -> tuple[str, ...]:
    """What a person should know of `max_length`, though the job runs."""
    if position_limit is None or request.max_length is None or request.max_length <= position_limit:
        return ()
    beyond = f"`--max_length {request.max_length}` is beyond the model's {position_limit} positions"
    return (f"{beyond}: it may train, but not well",)


def is_stated(request: Request, name: str) -> bool:
    """Whether a field was chosen by the user, and not filled in by `resolve_defaults`."""
    value = getattr(request, name)
    origin = request.origins.get(name)
    return value is not None and (origin is None or origin.stated or origin.value != value)


def _together(problems: Sequence[MemplanError]) -> MemplanError:
    lines = [f"`{problem.reference}`: {problem.message}" for problem in problems]
    hints = list(dict.fromkeys(problem.hint for problem in problems if problem.hint))
    is_unknown = all(problem.exit_code is ExitCode.UNKNOWN for problem in problems)
    return MemplanError(
        reference="several-problems",
        message=f"{len(problems)} problems with the request",
        context="\n".join(lines),
        hint="\n".join(hints) or None,
        exit_code=ExitCode.UNKNOWN if is_unknown else ExitCode.BAD_INPUT,
    )


def _sizes(request: Request) -> Iterator[MemplanError]:
    for name in (*_COUNTS, "lora_r", "lora_alpha"):
        value = getattr(request, name)
        if value is not None and not (isinstance(value, int) and 1 <= value <= _LARGEST):
            yield _out_of_range(name, value, f"a whole number from 1 to {_LARGEST}")
    dropout = request.lora_dropout
    if dropout is not None and not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        yield _out_of_range("lora_dropout", dropout, "at least 0 and less than 1")
    norm = request.max_grad_norm
    if norm is not None and not (isinstance(norm, int | float) and 0 <= norm < math.inf):
        yield _out_of_range("max_grad_norm", norm, "0, which turns clipping off, or a positive number")


def _names(request: Request) -> Iterator[MemplanError]:
    optim = request.optim
    if optim in UNSUPPORTED_OPTIMIZERS:
        yield MemplanError(
            reference="optimizer-not-supported",
            message=f"`--optim {optim}` is an optimizer of transformers that memplan can't run yet",
            hint=f"memplan answers for {listed(OPTIMIZERS, 'and')}",
            exit_code=ExitCode.UNKNOWN,
        )
    elif optim is not None and optim not in OPTIMIZERS:
        yield _unknown_name("optim", optim, OPTIMIZERS, "optimizer")
    if request.attn_implementation is not None and request.attn_implementation not in ATTENTION:
        yield _unknown_name("attn_implementation", request.attn_implementation, ATTENTION, "attention")
    storage = request.bnb_4bit_quant_storage
    if storage is not None and storage not in QUANT_STORAGE:
        yield _unknown_name("bnb_4bit_quant_storage", storage, QUANT_STORAGE, "storage dtype")
    if request.trainer != "transformers":
        yield MemplanError(
            reference="trainer-not-supported",
            message=f"`--trainer {request.trainer}` is not supported yet",
            context="Its defaults and its loss differ from those of transformers' Trainer",
            hint="Leave `--trainer` out to plan for transformers' Trainer",
            exit_code=ExitCode.UNKNOWN,
        )


def _precision(request: Request) -> Iterator[MemplanError]:
    if request.bf16 and request.fp16:
        yield MemplanError(
            reference="bf16-with-fp16",
            message="`--bf16` and `--fp16` exclude each other",
            context="Mixed precision computes in one type",
            hint="Keep one: `--bf16` on Ampere or newer, `--fp16` on older cards",
        )
    if request.fp16 and request.dtype == "float16" and not request.use_peft and not request.is_quantized:
        yield MemplanError(
            reference="fp16-weights-with-fp16",
            message="`--fp16` can't train weights of `--dtype float16`",
            context="Torch's GradScaler refuses to unscale float16 gradients",
            hint="Use `--dtype float32`, or `--bf16` in place of `--fp16`",
        )


def _quantization(request: Request) -> Iterator[MemplanError]:
    if request.load_in_4bit and request.load_in_8bit:
        yield MemplanError(
            reference="4bit-with-8bit",
            message="`--load_in_4bit` and `--load_in_8bit` exclude each other",
            context="Bitsandbytes converts a layer to one of them",
            hint="Keep one",
        )
    if request.is_quantized and not request.use_peft:
        flag = "load_in_4bit" if request.load_in_4bit else "load_in_8bit"
        yield MemplanError(
            reference="quantized-without-peft",
            message=f"`--{flag}` needs `--use_peft`",
            context="Transformers refuses to train a quantized model without adapters",
            hint="Add `--use_peft`",
        )
    if request.prepare_model_for_kbit_training and not request.is_quantized:
        yield MemplanError(
            reference="prepare-without-quantization",
            message="`--prepare_model_for_kbit_training` needs a quantized model",
            hint="Add `--load_in_4bit` or `--load_in_8bit`, or leave it out",
        )
    if not request.load_in_4bit:
        yield from _idle(request, _FOUR_BIT, "4bit-options-without-4bit", "load_in_4bit")


def _dependents(request: Request) -> Iterator[MemplanError]:
    if not request.use_peft:
        yield from _idle(request, _LORA, "lora-without-peft", "use_peft")
    by_peft = request.gradient_checkpointing is None and request.is_quantized and request.use_peft
    if request.use_reentrant and not (request.gradient_checkpointing or by_peft):
        yield from _idle(
            request, ("use_reentrant",), "reentrant-without-checkpointing", "gradient_checkpointing"
        )


def _idle(request: Request, names: Iterable[str], reference: str, needed: str) -> Iterator[MemplanError]:
    """Options that do nothing because another is off: more likely forgotten than meant."""
    idle = [name for name in names if is_stated(request, name)]
    if not idle:
        return
    options = listed((f"--{name}" for name in idle), "and")
    yield MemplanError(
        reference=reference,
        message=f"{options} {'does' if len(idle) == 1 else 'do'} nothing without `--{needed}`",
        hint=f"Add `--{needed}`, or leave {'it' if len(idle) == 1 else 'them'} out",
    )


def _processes(request: Request) -> Iterator[MemplanError]:
    cards = len(request.cards)
    if request.num_processes is not None and cards and request.num_processes > cards:
        yield MemplanError(
            reference="more-processes-than-cards",
            message=f"`--num_processes {request.num_processes}` is more than the cards named, {cards}",
            context="Each process of a job has a card of its own",
            hint=f"Name as many cards with `--gpus`, or use `--num_processes {cards}`",
        )


_RULES = (_sizes, _names, _precision, _quantization, _dependents, _processes)


def _out_of_range(name: str, value: Any, allowed: str) -> MemplanError:
    is_long = isinstance(value, int) and abs(value) > _LARGEST  # its digits could fill the screen
    return MemplanError(
        reference="value-out-of-range",
        message=f"`--{name}` can't be {'a number of that size' if is_long else printable(repr(value))}",
        hint=f"`--{name}` takes {allowed}",
    )


def _unknown_name(name: str, value: str, known: Sequence[str], kind: str) -> MemplanError:
    near = nearest(value, known, 3)
    return MemplanError(
        reference=f"unknown-{kind.replace(' ', '-')}",
        message=f"no {kind} is called `{printable(value)}`",
        context=f"`--{name}` takes {listed(known)}",
        hint=f"Did you mean {listed(near)}?" if near else None,
    )
