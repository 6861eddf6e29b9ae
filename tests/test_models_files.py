"""A model on this disk and what its config may say; every error by its exact text."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import ExitCode, MemplanError
from memplan.models import config, headers
from memplan.models.resolve import resolve

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
}
HINT_PASS = "Pass the model's directory or `config.json`, or its id on the hub"
HINT_AGAIN = "Correct the file, or take `config.json` from the model's repository again"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test of this process asks the network, nor finds a file of this repository by a model's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))


def written(directory: Path, fields: Any = None, name: str = "config.json") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / name
    file.write_text(fields if isinstance(fields, str) else json.dumps(LLAMA if fields is None else fields))
    return file


def safetensors(file: Path, dtypes: dict[str, str]) -> None:
    header = {name: {"dtype": dtype, "shape": [], "data_offsets": [0, 0]} for name, dtype in dtypes.items()}
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw)


def error_of(model: Any, **options: Any) -> tuple[str, str, str | None, str | None]:
    with pytest.raises(MemplanError) as caught:
        resolve(model, **options)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    return caught.value.reference, caught.value.message, caught.value.context, caught.value.hint


def test_a_directory_and_its_config_are_the_same_model(tmp_path: Path) -> None:
    file = written(tmp_path / "m", {**LLAMA, "dtype": "bfloat16"})
    for typed in (str(file), str(file.parent), f"{file.parent}/"):
        facts = resolve(typed)
        assert facts.name == typed and facts.local_dir == file.parent and facts.source == str(file)
        assert facts.config == {**LLAMA, "dtype": "bfloat16"} and facts.checkpoint_dtype == "bfloat16"


def test_an_existing_path_comes_before_the_catalogue(tmp_path: Path) -> None:
    written(tmp_path / "gpt2")
    assert resolve("gpt2").config == LLAMA


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": "bf16"}, "bfloat16"),
        ({"text_config": {"dtype": "float32"}}, "float32"),
        ({"dtype": "auto"}, None),
        ({"dtype": {"": "float32"}}, None),
        ({"dtype": 16}, None),
        ({}, None),
    ],
)
def test_the_dtype_that_a_config_states(fields: dict[str, Any], dtype: str | None) -> None:
    assert resolve({**LLAMA, **fields}).checkpoint_dtype == dtype


def test_headers_tell_the_dtype_that_the_config_does_not(tmp_path: Path) -> None:
    written(tmp_path)
    safetensors(tmp_path / "model-00001-of-00002.safetensors", {"b": "F32", "a": "F8_E4M3", "aa": "BF16"})
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "x": "../../etc/passwd.safetensors"}}
    written(tmp_path, index, "model.safetensors.index.json")
    assert resolve(str(tmp_path)).checkpoint_dtype == "bfloat16"
    safetensors(tmp_path / "model.safetensors", {"a": "F16"})
    assert resolve(str(tmp_path)).checkpoint_dtype == "float16"
    written(tmp_path, {**LLAMA, "dtype": "float32"})
    assert resolve(str(tmp_path)).checkpoint_dtype == "float32"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 9) + b'{"a":[1]}',
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)
def test_a_broken_header_tells_nothing(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert headers.read_header(tmp_path / "model.safetensors") is None
    assert headers.directory_dtype(tmp_path) is None


def test_quantized_and_own_code_are_noted() -> None:
    facts = resolve(
        {**LLAMA, "quantization_config": {"quant_method": "GPTQ"}, "auto_map": {"AutoConfig": "x.Y"}}
    )
    assert (facts.quantized_with, facts.needs_remote_code) == ("gptq", True)
    assert facts.notes == (
        "the checkpoint is stored quantized (`gptq`)",
        "the config names code of its own (`auto_map`)",
    )


def test_errors_of_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"

    def given(content: str | bytes) -> tuple[str, str, str | None, str | None]:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return error_of(str(file))

    unreadable = f"`{file}` is not a readable config"
    assert given('{"a": 1,\n "b" 2}') == (
        "config-broken",
        unreadable,
        "Expecting ':' delimiter at line 2, column 6",
        HINT_AGAIN,
    )
    assert given("") == ("config-broken", unreadable, "Expecting value at line 1, column 1", HINT_AGAIN)
    assert given("[1]") == (
        "config-broken",
        unreadable,
        "It holds a list where a config is an object of fields",
        HINT_AGAIN,
    )
    assert given("null") == (
        "config-broken",
        unreadable,
        "It holds null where a config is an object of fields",
        HINT_AGAIN,
    )
    assert given(b'{"a": "\xff"}') == (
        "config-broken",
        unreadable,
        "It is not UTF-8 text: byte 7 is 0xff",
        HINT_AGAIN,
    )
    assert given('{"a": ' + "9" * 5000 + "}") == (
        "config-broken",
        unreadable,
        "It holds a number too long to read",
        HINT_AGAIN,
    )
    assert given(b" " * (4 << 20) + b"{}") == (
        "config-too-large",
        f"`{file}` is larger than 4 MiB, too large for a model's config",
        None,
        "Check that it is the `config.json` of a model",
    )
    assert given('{"a":' * 200_000) == (
        "config-too-large",
        f"`{file}` is nested too deeply to be a model's config",
        None,
        "Check that it is the `config.json` of a model",
    )
    assert given('{"bos_token": "<s>", "eos_token": "</s>"}') == (
        "config-no-model-type",
        f"`{file}` has no `model_type`",
        "Its fields are `bos_token` and `eos_token`",
        'Add the one that transformers knows the architecture by, e.g. `"model_type": "llama"`',
    )
    assert given('{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}') == (
        "config-inconsistent",
        f"`{file}` describes no model that can be built: 1 problem",
        "`hidden_size` 100 does not divide by `num_attention_heads` 3, without `head_dim`",
        "Correct the fields, or take `config.json` from the model's repository again",
    )


def test_all_problems_of_a_config_are_listed_at_once() -> None:
    fields = {
        **LLAMA,
        "hidden_size": -1,
        "vocab_size": 0,
        "num_hidden_layers": 10**6,
        "intermediate_size": 2.5,
        "head_dim": True,
        "num_key_value_heads": 3,
        "text_config": {"hidden_size": "64", "n_head": 5, "n_embd": 64},
    }
    reference, message, context, _ = error_of(fields)
    assert (reference, message) == (
        "config-inconsistent",
        "`the config given` describes no model that can be built: 7 problems",
    )
    assert context == "\n".join(
        [
            "`hidden_size` is negative",
            "`num_hidden_layers` is above 10,000, more than any model has",
            "`intermediate_size` is 2.5, not an integer",
            "`vocab_size` is zero",
            "`head_dim` is True, not an integer",
            "`num_attention_heads` 4 does not divide by `num_key_value_heads` 3",
            "`text_config.hidden_size` is '64', not an integer",
        ]
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 48, "hidden_size": 100},
        {"num_attention_heads": [4, 8], "hidden_size": 100},
        {"num_key_value_heads": None},
        {"model_type": "mamba", "num_attention_heads": None},
    ],
)
def test_what_some_architectures_declare_is_no_problem(fields: dict[str, Any]) -> None:
    assert resolve({**LLAMA, **fields}).config["vocab_size"] == 100


def test_errors_of_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert error_of("empty") == (
        "config-missing",
        "`empty` has no `config.json`",
        "The directory is empty",
        HINT_PASS,
    )
    written(tmp_path / "run" / "checkpoint-500")
    assert error_of("run/") == (
        "config-missing",
        "`run/` has no `config.json`",
        "Directories in it have one",
        "Pass `run/checkpoint-500`",
    )
    written(tmp_path / "tok", {}, "tokenizer_config.json")
    assert error_of("tok") == (
        "config-missing",
        "`tok` has no `config.json`",
        "It holds a tokenizer only",
        HINT_PASS,
    )
    written(tmp_path / "gg", "", "m.Q4_K_M.gguf")
    assert error_of("gg") == (
        "config-missing",
        "`gg` has no `config.json`",
        "It holds GGUF files, which have no `config.json` beside them",
        "Pass the same model in Hugging Face's layout, or its id on the hub",
    )
    written(tmp_path / "other", "", "a\x1b[31m.txt")
    assert error_of("other") == (
        "config-missing",
        "`other` has no `config.json`",
        "It holds `a.txt`",
        HINT_PASS,
    )
    assert error_of("gg/m.Q4_K_M.gguf") == (
        "model-is-weights",
        "`gg/m.Q4_K_M.gguf` is a GGUF file, not a model's config",
        "The architecture is read from a `config.json`; weights are never read",
        "Pass the model's directory or `config.json`, or its id on the hub",
    )
    written(tmp_path / "run" / "checkpoint-500", "", "model.safetensors")
    assert error_of("run/checkpoint-500/model.safetensors") == (
        "model-is-weights",
        "`run/checkpoint-500/model.safetensors` is a safetensors file, not a model's config",
        "The architecture is read from a `config.json`; weights are never read",
        "Pass its directory, which has one: `run/checkpoint-500`",
    )
    written(tmp_path / "lora", {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}, "adapter_config.json")
    for typed in ("lora", "lora/adapter_config.json"):
        assert error_of(typed) == (
            "model-is-adapter",
            f"`{typed}` is a PEFT adapter, not a model",
            "Its base model is `meta-llama/Llama-2-7b-hf`",
            "Plan its base model with an adapter on it: `meta-llama/Llama-2-7b-hf --use_peft`",
        )
    written(tmp_path / "lora", "nonsense", "adapter_config.json")
    assert error_of("lora")[2:] == (
        "`adapter_config.json` does not name its base model",
        "Plan its base model with an adapter on it: `MODEL --use_peft`",
    )
    (tmp_path / "gpt2").mkdir()
    assert error_of("gpt2") == (
        "config-missing",
        "`gpt2` has no `config.json`",
        "The directory is empty",
        "To mean the catalogue's model, write `openai-community/gpt2`",
    )
    os.mkfifo(tmp_path / "pipe")
    assert error_of("pipe") == ("config-missing", "`pipe` is no regular file", None, HINT_PASS)
    assert error_of("./nowhere/config.json") == (
        "path-not-found",
        "`./nowhere/config.json` does not exist",
        None,
        HINT_PASS,
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(
    st.sampled_from([*config._SIZES, "model_type", "text_config", "dtype", "auto_map"]), JSON
)


@settings(max_examples=200, deadline=None)
@given(FIELDS)
def test_any_config_is_a_model_or_one_error(fields: dict[str, Any]) -> None:
    try:
        assert resolve(fields).config == fields
    except MemplanError as error:
        assert error.reference in ("config-no-model-type", "config-inconsistent")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_fields_or_one_error(raw: bytes) -> None:
    try:
        assert isinstance(config.parse(raw, "x"), dict)
    except MemplanError as error:
        assert error.reference == "config-broken"
