"""A model's `config.json`: read within bounds, and checked for what no model can have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from memplan.errors import MemplanError
from memplan.names import listed, printable

MAX_BYTES = 4 << 20
"""Of a `config.json`; the largest on the hub (label tables of classifiers) stay far below."""

_DTYPES = {
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
    "float32": "float32", "fp32": "float32", "float": "float32",
}  # fmt: skip

# Hugging Face's field and what older architectures call it (GPT-2's and T5's names).
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_OTHER_SIZES = (
    "intermediate_size", "d_ff", "vocab_size", "padded_vocab_size", "head_dim", "d_kv", "kv_channels",
    "max_position_embeddings", "n_positions",
)  # fmt: skip
_SIZES = _HIDDEN + _LAYERS + _HEADS + _KV_HEADS + _OTHER_SIZES
_OWN_HEAD_WIDTH = ("head_dim", "d_kv", "kv_channels", "head_size", "attention_hidden_size")

_MOST = 2**31 - 1
_MOST_LAYERS = 10_000
"""Above any model's: beyond these the number is a slip, and building such a model would not end."""


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """The fields of a `config.json`; `where` names it in errors.

    Raises `config-too-large` above `MAX_BYTES` or for nesting too deep to read, and `config-broken`
    for what is not UTF-8, not JSON or not an object.
    """
    if len(raw) > MAX_BYTES:
        raise too_large(where)
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _broken(where, f"It is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise _broken(where, f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise MemplanError(
            "config-too-large",
            f"`{where}` is nested too deeply to be a model's config",
            hint="Check that it is the `config.json` of a model",
        ) from None
    except ValueError:  # an integer of thousands of digits
        raise _broken(where, "It holds a number too long to read") from None
    if not isinstance(fields, dict):
        raise _broken(where, f"It holds {_json_kind(fields)} where a config is an object of fields")
    return fields


def too_large(where: str) -> MemplanError:
    """The error for a file above `MAX_BYTES`, of which no more is read."""
    return MemplanError(
        "config-too-large",
        f"`{where}` is larger than {MAX_BYTES >> 20} MiB, too large for a model's config",
        hint="Check that it is the `config.json` of a model",
    )


def is_adapter(adapter_config: Mapping[str, Any], typed: str) -> MemplanError:
    """The error for a PEFT adapter given as the model, from its `adapter_config.json`."""
    base = adapter_config.get("base_model_name_or_path")
    named = printable(base) if isinstance(base, str) and base else None
    return MemplanError(
        "model-is-adapter",
        f"`{printable(typed)}` is a PEFT adapter, not a model",
        context=f"Its base model is `{named}`"
        if named
        else "`adapter_config.json` does not name its base model",
        hint=f"Plan its base model with an adapter on it: `{named or 'MODEL'} --use_peft`",
    )


def check(config: Mapping[str, Any], where: str) -> None:
    """Nothing where the config can be a model's; only declared fields are looked at.

    Raises `config-no-model-type`, or `config-inconsistent` with all the problems found.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise MemplanError(
            "config-no-model-type",
            f"`{where}` has no `model_type`",
            context=_fields_found(config),
            hint='Add the one that transformers knows the architecture by, e.g. `"model_type": "llama"`',
        )
    problems = [problem for prefix, part in _parts(config) for problem in _problems(prefix, part)]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise MemplanError(
            "config-inconsistent",
            f"`{where}` describes no model that can be built: {count}",
            context="\n".join(problems),
            hint="Correct the fields, or take `config.json` from the model's repository again",
        )


def checkpoint_dtype(config: Mapping[str, Any]) -> str | None:
    """`bfloat16`, `float16` or `float32` where the config states it, for the whole or for its text model."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        stated = part.get("dtype") or part.get("torch_dtype")
        if isinstance(stated, str) and (dtype := _DTYPES.get(stated.removeprefix("torch."))):
            return dtype
    return None


def quantized_with(config: Mapping[str, Any]) -> str | None:
    """The method of a checkpoint that is stored quantized, in lower case; None for one that is not."""
    stated = config.get("quantization_config")
    if not isinstance(stated, Mapping) or not stated:
        return None
    return printable(str(stated.get("quant_method", "unnamed")), limit=30).lower()


def notes_on(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader of the answer should know of the config."""
    notes = []
    if method := quantized_with(config):
        notes.append(f"the checkpoint is stored quantized (`{method}`)")
    if has_own_code(config):
        notes.append("the config names code of its own (`auto_map`)")
    return tuple(notes)


def has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether the config names classes that its repository defines."""
    return bool(config.get("auto_map"))


def _broken(where: str, context: str) -> MemplanError:
    return MemplanError(
        "config-broken",
        f"`{where}` is not a readable config",
        context=context,
        hint="Correct the file, or take `config.json` from the model's repository again",
    )


def _json_kind(value: object) -> str:
    kinds = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _fields_found(config: Mapping[str, Any]) -> str:
    if not config:
        return "It has no fields at all"
    names = [printable(str(name), limit=40) for name in list(config)[:5]]
    return f"Its {'first ' if len(config) > 5 else ''}fields are {listed(names, 'and')}"


_Part = tuple[str, Mapping[str, Any]]


def _parts(config: Mapping[str, Any], prefix: str = "", depth: int = 2) -> Iterator[_Part]:
    """The config and those within it (`text_config`, `vision_config`, …), with the prefix of their fields."""
    yield prefix, config
    for name, value in config.items() if depth else ():
        is_part = isinstance(name, str) and name.endswith("_config") and name != "quantization_config"
        if is_part and isinstance(value, Mapping):
            yield from _parts(value, f"{prefix}{printable(name, limit=40)}.", depth - 1)


def _problems(prefix: str, part: Mapping[str, Any]) -> Iterator[str]:
    wrong = {name: why for name in _SIZES if (why := _why_no_size(name, part.get(name)))}
    for name, why in wrong.items():
        yield f"`{prefix}{name}` {why}"

    def size(names: tuple[str, ...]) -> tuple[str, int] | None:
        name = next((name for name in names if part.get(name) is not None), None)
        value = part.get(name) if name else None
        return (f"{prefix}{name}", value) if isinstance(value, int) and name not in wrong else None

    hidden, heads, kv_heads = size(_HIDDEN), size(_HEADS), size(_KV_HEADS)
    if hidden and heads and hidden[1] % heads[1] and not _states_head_width(part):
        yield f"`{hidden[0]}` {hidden[1]} does not divide by `{heads[0]}` {heads[1]}, without `head_dim`"
    if heads and kv_heads and heads[1] % kv_heads[1]:
        yield f"`{heads[0]}` {heads[1]} does not divide by `{kv_heads[0]}` {kv_heads[1]}"


def _states_head_width(part: Mapping[str, Any]) -> bool:
    return any(
        value is not None and isinstance(name, str) and ("head_dim" in name or name in _OWN_HEAD_WIDTH)
        for name, value in part.items()
    )


def _why_no_size(name: str, value: object) -> str | None:
    """Why the value can be no size; absent ones and lists (one number a layer) are not judged."""
    if value is None or isinstance(value, list | tuple):
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        return f"is {printable(repr(value), limit=40)}, not an integer"
    if value <= 0:
        return "is zero" if value == 0 else "is negative"
    most = _MOST_LAYERS if name in _LAYERS else _MOST
    return f"is above {most:,}, more than any model has" if value > most else None
