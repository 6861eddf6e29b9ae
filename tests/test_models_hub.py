"""The hub, by a server of our own on 127.0.0.1: what it answers, and what memplan then says."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "dtype": "bfloat16"}
NEAR_13B = "`meta-llama/Llama-2-13b-hf`, `huggyllama/llama-13b` or `meta-llama/Llama-3.2-3B`"
ELSEWHERE = "A directory or a `config.json` works without the hub"

_HEADER = json.dumps(
    {
        "b": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "a": {"dtype": "F16", "shape": [], "data_offsets": [4, 6]},
    }
).encode()
_SHARD = struct.pack("<Q", len(_HEADER)) + _HEADER
_INDEX = {"weight_map": {"a": "model-1-of-1.safetensors"}}
FILES: dict[str, bytes] = {
    "org/good/config.json": json.dumps(LLAMA).encode(),
    "org/no-dtype/config.json": b'{"model_type": "llama"}',
    "org/no-dtype/model.safetensors": _SHARD,
    "org/sharded/config.json": b'{"model_type": "llama"}',
    "org/sharded/model.safetensors.index.json": json.dumps(_INDEX).encode(),
    "org/sharded/model-1-of-1.safetensors": _SHARD,
    "org/broken/config.json": b'{"model_type": ',
    "org/huge/config.json": b" " * ((4 << 20) + 1),
    "org/lora/adapter_config.json": b'{"base_model_name_or_path": "gpt2"}',
    "org/gguf-only/README.md": b"",
    "meta-llama/Llama-2-13b-hf/config.json": json.dumps(LLAMA).encode(),
}
STATUS = {
    "org/gated": (403, "GatedRepo"),
    "org/gated-anonymous": (401, "GatedRepo"),
    "org/forbidden": (403, ""),
    "org/down": (500, ""),
    "org/private": (401, "RepoNotFound"),
}


class Hub(BaseHTTPRequestHandler):
    """`/ORG/NAME/resolve/REVISION/FILE` as the hub answers it."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        self.asked.append(f"{self.command} {repo} {file}")
        if repo == "org/not-a-hub":
            return self._send(200, {}, b"{}")
        status, code = STATUS.get(repo, (0, ""))
        if not status and not any(name.startswith(f"{repo}/") for name in FILES):
            status, code = 404, "RepoNotFound"
        elif not status and revision not in ("main", COMMIT):
            status, code = 404, "RevisionNotFound"
        elif not status and f"{repo}/{file}" not in FILES:
            status, code = 404, "EntryNotFound"
        if status:
            return self._send(status, {"X-Error-Code": code} if code else {}, b"")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash((repo, file)))}"'}
        return self._send(200, headers, FILES[f"{repo}/{file}"])

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


_ASK = """
import json, sys
from memplan.errors import MemplanError
from memplan.models.resolve import resolve
for ask in json.loads(sys.argv[1]):
    try:
        facts = resolve(**ask)
        print(json.dumps({"name": facts.name, "source": facts.source, "dtype": facts.checkpoint_dtype,
                          "revision": facts.revision, "config": dict(facts.config), "notes": facts.notes}))
    except MemplanError as error:
        print(json.dumps(error.to_dict()))
"""


def answers(asks: list[str | dict[str, Any]], home: Path, **environment: str) -> list[dict[str, Any]]:
    """What a fresh process answers, since huggingface_hub reads its environment when it is imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", _ASK, json.dumps([a if isinstance(a, dict) else {"model": a} for a in asks])],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=home,
        env={
            **inherited,
            "HF_HOME": str(home),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def said(answer: dict[str, Any]) -> tuple[Any, ...]:
    assert answer["exit_code"] == 2
    return tuple(answer[name] for name in ("reference", "message", "context", "hint"))


def test_models_on_the_hub(endpoint: str, tmp_path: Path) -> None:
    host = endpoint.removeprefix("http://")
    Hub.asked.clear()
    good, again, no_dtype, sharded, pinned, catalogue, at_revision = answers(
        [
            "org/good",
            "org/good",
            "org/no-dtype",
            "org/sharded",
            {"model": "org/good", "revision": COMMIT},
            "llama-2-13b",
            {"model": "llama-2-13b", "revision": "main"},
        ],
        tmp_path,
        HF_ENDPOINT=endpoint,
    )
    assert (
        good
        == again
        == pinned
        == {
            "name": "org/good",
            "source": f"{host}/org/good@{COMMIT[:12]}",
            "dtype": "bfloat16",
            "revision": COMMIT,
            "config": LLAMA,
            "notes": [],
        }
    )
    assert no_dtype["dtype"] == sharded["dtype"] == "float16"
    assert catalogue["source"].startswith("catalogue: ")
    assert at_revision["source"] == f"{host}/meta-llama/Llama-2-13b-hf@{COMMIT[:12]}"
    assert Hub.asked.count("GET org/good config.json") == 1, "the second comes from the cache"
    assert {line.split()[2] for line in Hub.asked if "org/good" in line} == {"config.json"}, (
        "the dtype is stated"
    )


def test_errors_of_the_hub(endpoint: str, tmp_path: Path) -> None:
    host = endpoint.removeprefix("http://")
    asks: list[str | dict[str, Any]] = [
        "org/missing",
        "org/private",
        "lama-2-13b",
        "org/gated",
        "org/gated-anonymous",
        "org/forbidden",
        {"model": "org/good", "revision": "v9"},
        "org/gguf-only",
        "org/lora",
        "org/huge",
        "org/broken",
        "org/down",
        "org/not-a-hub",
    ]
    got = dict(
        zip([str(a) for a in asks], map(said, answers(asks, tmp_path, HF_ENDPOINT=endpoint)), strict=True)
    )
    token = "a token (`--token`, `HF_TOKEN` or `hf auth login`)"
    for name in ("org/missing", "org/private"):
        assert got[name] == (
            "model-not-found",
            f"{host} has no model `{name}`, or keeps it private",
            None,
            f"A private model needs {token}",
        )
    assert got["lama-2-13b"] == (
        "unknown-model",
        "no model is called `lama-2-13b`",
        f"It is neither a path, nor a name in the catalogue, nor a model on {host}",
        f"Did you mean {NEAR_13B}? {ELSEWHERE}",
    )
    for name in ("org/gated", "org/gated-anonymous", "org/forbidden"):
        assert got[name] == (
            "model-gated",
            f"`{name}` is gated: the hub gives its files only to accounts that were granted access",
            None,
            f"Ask for access at {host}/{name} and pass {token.replace('a token', 'a token of that account')}",
        )
    assert got[str(asks[6])] == (
        "revision-not-found",
        "`org/good` has no revision `v9`",
        None,
        "Pass a branch, a tag or a commit of the model's repository",
    )
    assert got["org/gguf-only"] == (
        "config-missing",
        f"`org/gguf-only` has no `config.json` on {host}",
        "Repositories of GGUF files, of diffusers pipelines and of tokenizers have none",
        f"Pass the id of the model that it was made from. {ELSEWHERE}",
    )
    assert got["org/lora"] == (
        "model-is-adapter",
        "`org/lora` is a PEFT adapter, not a model",
        "Its base model is `gpt2`",
        "Plan its base model with an adapter on it: `gpt2 --use_peft`",
    )
    assert got["org/huge"] == (
        "config-too-large",
        f"`config.json of {host}/org/huge` is larger than 4 MiB, too large for a model's config",
        None,
        "Check that it is the `config.json` of a model",
    )
    assert got["org/broken"] == (
        "config-broken",
        f"`config.json of {host}/org/broken@{COMMIT[:12]}` is not a readable config",
        "Expecting value at line 1, column 16",
        "Correct the file, or take `config.json` from the model's repository again",
    )
    assert got["org/down"] == (
        "hub-failed",
        f"{host} failed to give the config of `org/down`",
        "It answered with HTTP status 500",
        f"Try again later. {ELSEWHERE}",
    )
    assert got["org/not-a-hub"] == (
        "hub-failed",
        f"{host} failed to give the config of `org/not-a-hub`",
        "The answer is not a hub's: it names no commit; check `HF_ENDPOINT` and the proxy",
        f"Try again later. {ELSEWHERE}",
    )


def test_without_a_connection_the_cache_answers(endpoint: str, tmp_path: Path) -> None:
    answers(["org/good"], tmp_path, HF_ENDPOINT=endpoint)
    nowhere = "127.0.0.1:9"  # the discard port: refused
    for environment in (
        {"HF_ENDPOINT": f"http://{nowhere}"},
        {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1"},
    ):
        why = (
            "offline mode is on (`HF_HUB_OFFLINE`)"
            if "HF_HUB_OFFLINE" in environment
            else f"{nowhere} cannot be reached"
        )
        good, other, near, ours = answers(
            ["org/good", "org/goad", "qwen/qwen9-7b", "llama-2-13b"], tmp_path, **environment
        )
        assert good["config"] == LLAMA and good["revision"] == COMMIT
        assert good["notes"] == ["the hub could not be asked; the config is the cached one"]
        assert said(other) == (
            "hub-offline",
            f"`org/goad` cannot be looked up: {why}",
            "It is not in the catalogue, nor in the hub's cache, which holds `org/good`",
            ELSEWHERE,
        )
        assert said(near)[3] == (
            "The catalogue, which needs no network, has "
            f"`Qwen/Qwen-7B`, `Qwen/Qwen2-7B` and `Qwen/Qwen2-72B`. {ELSEWHERE}"
        )
        assert ours["source"].startswith("catalogue: ")


def test_without_a_connection_and_a_cache(tmp_path: Path) -> None:
    (other,) = answers(["org/good"], tmp_path, HF_HUB_OFFLINE="1")
    assert said(other) == (
        "hub-offline",
        "`org/good` cannot be looked up: offline mode is on (`HF_HUB_OFFLINE`)",
        "It is not in the catalogue, nor in the hub's cache",
        ELSEWHERE,
    )
