"""Finding a model by its name; every error by its exact text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import ExitCode, MemplanError
from memplan.models import catalogue, config
from memplan.models.resolve import resolve
from memplan.names import printable

ELSEWHERE = "A directory or a `config.json` works without the hub"
HINT_NAMES = (
    "Pass a hub id (`meta-llama/Llama-2-13b-hf`), a name in the catalogue (`llama-2-13b`), "
    "a directory or a `config.json`"
)
NEAR_13B = "`meta-llama/Llama-2-13b-hf`, `huggyllama/llama-13b` or `meta-llama/Llama-3.2-3B`"
ENTRIES = [
    (model_id, name)
    for model_id in catalogue.ids()
    for name in (model_id, *catalogue._lines()[model_id]["aliases"])
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test of this process asks the network, nor finds a file of this repository by a model's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))


def error_of(model: Any, **options: Any) -> tuple[str, str, str | None, str | None]:
    with pytest.raises(MemplanError) as caught:
        resolve(model, **options)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    return caught.value.reference, caught.value.message, caught.value.context, caught.value.hint


# --- the catalogue -----------------------------------------------------------------------------------------


def test_every_model_resolves_by_its_id_and_every_alias() -> None:
    for model_id, name in ENTRIES:
        entry = catalogue.find(name)
        meant = name if "/" in name else model_id  # an old name without an organisation is the id itself
        assert entry is not None and entry.id == model_id and entry.meant.casefold() == meant.casefold()
        if entry.has_config:
            facts = resolve(name.upper())
            assert facts.name == facts.hub_id == entry.meant
            assert facts.source.startswith("catalogue: ") and facts.config["model_type"]


def test_every_name_without_its_organisation_is_found() -> None:
    for _, name in ENTRIES:
        entry = catalogue.find(name.rpartition("/")[2])
        short = [catalogue._key(full.rpartition("/")[2]) for full in (entry.meant, name)] if entry else []
        assert entry is not None and short[0] == short[1]
        assert entry.others == ()


def test_every_config_in_the_catalogue_passes_the_checks() -> None:
    for model_id in catalogue.ids():
        config.check(catalogue._lines()[model_id]["config"], model_id)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("llama-2-13b", "meta-llama/Llama-2-13b-hf"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("Llama2-7B", "meta-llama/Llama-2-7b-hf"),
        ("llama_2_70b_chat", "meta-llama/Llama-2-70b-chat-hf"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("qwen-2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
        ("gemma-3-4b", "google/gemma-3-4b-pt"),
        ("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("opt-1.3b", "facebook/opt-1.3b"),
        ("opt-13b", "facebook/opt-13b"),
        ("pythia-1.4b", "EleutherAI/pythia-1.4b"),
        ("gpt2", "openai-community/gpt2"),
        ("phi-1.5", "microsoft/phi-1_5"),
    ],
)
def test_short_names(typed: str, meant: str) -> None:
    facts = resolve(typed)
    assert facts.name == meant
    if typed.casefold() != meant.casefold():
        assert f"`{typed}` is {meant}" in facts.source


@pytest.mark.parametrize(
    "name", ["llama-27b", "pythia-14b", "t5", "whisper-large", "llama", "someone/Llama-2-13b-hf"]
)
def test_a_short_name_is_never_stretched_to_another_model(name: str) -> None:
    assert catalogue.find(name) is None


def test_facts_say_what_was_chosen_and_what_is_not_verified() -> None:
    facts = resolve("mistral-7b")
    assert facts.notes[0] == (
        "`mistral-7b` is taken as mistralai/Mistral-7B-v0.1; "
        "it could also mean mistralai/Mistral-7B-v0.3, mistralai/Mistral-7B-Instruct-v0.2"
    )
    assert resolve("vicuna-7b").source.endswith(
        "(`vicuna-7b` is lmsys/vicuna-7b-v1.5, with the shapes of meta-llama/Llama-2-7b-hf)"
    )
    unverified = resolve("facebook/opt-13b")
    assert unverified.verified is False and "not verified" in unverified.notes[0]
    assert resolve("deepseek-v3").quantized_with == "fp8"
    assert resolve("THUDM/chatglm3-6b").needs_remote_code
    thirteen = resolve("llama-2-13b")
    assert (thirteen.known_params, thirteen.verified, thirteen.checkpoint_dtype) == (
        13_015_864_320,
        True,
        "float16",
    )


def test_facts_are_the_callers_own() -> None:
    resolve("llama-2-13b").config["hidden_size"] = 1  # type: ignore[index]
    assert resolve("llama-2-13b").config["hidden_size"] == 5120


def test_near_names() -> None:
    assert catalogue.near("lama-2-13")[0] == "meta-llama/Llama-2-13b-hf"
    assert catalogue.near("meta-llama/Lama-2-13b-hf", 1) == ("meta-llama/Llama-2-13b-hf",)
    assert catalogue.near("zzzzzz") == ()


# --- names -----------------------------------------------------------------------------------------------


def test_errors_of_names() -> None:
    assert error_of("  ") == (
        "unknown-model",
        "the model's name is empty",
        None,
        HINT_NAMES,
    )
    assert error_of("a/b/c") == (
        "unknown-model",
        "no model is called `a/b/c`",
        "It is neither a path, nor a name in the catalogue, nor a model on huggingface.co",
        "A directory or a `config.json` works without the hub",
    )
    assert error_of("lama-2-13b!") == (
        "unknown-model",
        "no model is called `lama-2-13b!`",
        "It is neither a path, nor a name in the catalogue, nor a model on huggingface.co",
        f"Did you mean {NEAR_13B}? {ELSEWHERE}",
    )
    assert error_of("llama-2-13b", revision="../../x") == (
        "revision-not-found",
        "`../../x` is no revision",
        None,
        "Pass a branch, a tag or a commit of the model's repository",
    )


@pytest.mark.parametrize(
    "hostile",
    [
        "\x1b[31mred",
        "\x1b]8;;http://x\x07link",
        "a\x00b",
        "../" * 50 + "etc",
        "x" * 100_000,
        "\ud800",
        "‮evil",
        "a`b",
    ],
)
def test_hostile_names_are_answered_and_not_echoed(hostile: str) -> None:
    _, message, context, hint = error_of(hostile)
    for text in (message, context or "", hint or ""):
        assert text.isprintable() and len(text) < 400


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_what_is_shown_is_printable(text: str) -> None:
    shown = printable(text, limit=20)
    assert shown and len(shown) <= max(20, len("(no printable character)")) and "`" not in shown
    assert shown.isprintable()


def test_resolving_imports_nothing_heavy() -> None:
    code = (
        "import sys, memplan.models.resolve as r; r.resolve('llama-2-13b');"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'httpx') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment()
    )
    assert out.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
