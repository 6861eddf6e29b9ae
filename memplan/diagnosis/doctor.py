"""What is wrong with an environment before anything runs in it: versions, backends, GPUs."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memplan.diagnosis.compat import affected_by
from memplan.diagnosis.types import CompatMatch
from memplan.errors import MemplanError
from memplan.units import format_bytes

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "deepspeed", "flash-attn",
    "liger-kernel", "safetensors", "vllm",
)  # fmt: skip
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES", "BNB_CUDA_VERSION")
_STOPS = frozenset(
    {
        "triu-tril-bfloat16",
        "bitsandbytes-cuda-setup",
        "zero-no-sync",
        "deepspeed-elastic-log",
        "optimizer-has-no-train",
    }
    | {"torch-load-vulnerable", "fsdp-integer-weights"}
)
"""Entries that a job meets whatever its code is; the others need code of another version."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to mend before a job starts."""

    reference: str
    message: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Health:
    """The environment, and what is wrong with it."""

    python: str
    versions: Mapping[str, str | None]
    torch_cuda: str | None
    bitsandbytes_backends: tuple[str, ...]
    gpus: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    notes: tuple[CompatMatch, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The environment as a program reads it."""
        return asdict(self)


def doctor() -> Health:
    """This environment's versions, CUDA, bitsandbytes backends and GPUs, held against the known conflicts."""
    versions = {name: _version(name) for name in PACKAGES}
    gpus, no_gpu = _gpus()
    torch_cuda = _torch_cuda()
    backends = _bitsandbytes_backends()
    settings = {name: value for name in _SETTINGS if (value := os.environ.get(name)) is not None}
    return judged(versions, torch_cuda, backends, gpus, no_gpu, settings)


def judged(
    versions: Mapping[str, str | None],
    torch_cuda: str | None,
    backends: tuple[str, ...],
    gpus: tuple[str, ...],
    no_gpu: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Health:
    """What is wrong with an environment that is described."""
    installed = {name: version for name, version in versions.items() if version is not None}
    conflicts = affected_by(installed)
    problems = [
        Problem(reference=entry.id, message=f"{entry.title} ({entry.versions.rstrip('.')})", fix=entry.fix)
        for entry in conflicts
        if entry.id in _STOPS
    ]
    problems += _of_the_machine(installed, torch_cuda, backends, gpus, no_gpu)
    return Health(
        python=platform.python_version(),
        versions=versions,
        torch_cuda=torch_cuda,
        bitsandbytes_backends=backends,
        gpus=gpus,
        settings=settings or {},
        problems=tuple(problems),
        notes=tuple(entry.match() for entry in conflicts if entry.id not in _STOPS),
    )


def _of_the_machine(
    installed: Mapping[str, str],
    torch_cuda: str | None,
    backends: tuple[str, ...],
    gpus: tuple[str, ...],
    no_gpu: str | None,
) -> list[Problem]:
    problems = []
    if "torch" not in installed:
        problems.append(_problem("no-torch", "torch is not installed", "`pip install torch`."))
    elif gpus and torch_cuda is None:
        problems.append(
            _problem(
                "cpu-torch",
                f"torch {installed['torch']} is a build without CUDA, and this machine has a GPU",
                "Install a CUDA build from https://pytorch.org.",
            )
        )
    if gpus and torch_cuda and "bitsandbytes" in installed and not _serves(backends, torch_cuda):
        problems.append(
            _problem(
                "no-bitsandbytes-backend",
                f"bitsandbytes {installed['bitsandbytes']} has no library for CUDA {torch_cuda}",
                "`pip install -U bitsandbytes`, or `BNB_CUDA_VERSION` with one that it has.",
            )
        )
    if not gpus and no_gpu and torch_cuda:
        problems.append(
            _problem(
                "no-gpu", f"no GPU is seen: {no_gpu}", "Look at `nvidia-smi` and `CUDA_VISIBLE_DEVICES`."
            )
        )
    return problems


def _problem(reference: str, message: str, fix: str) -> Problem:
    return Problem(reference=reference, message=message, fix=fix)


def _serves(backends: tuple[str, ...], torch_cuda: str) -> bool:
    """bitsandbytes takes the library of torch's CUDA, else the latest one of the same major version."""
    major = torch_cuda.partition(".")[0]
    return any(
        backend == f"cuda{torch_cuda.replace('.', '')}" or backend.startswith(f"cuda{major}")
        for backend in backends
    )


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _torch_cuda() -> str | None:
    """From torch/version.py, so that torch needn't be imported."""
    folder = _folder("torch")
    if folder is None:
        return None
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]{0,40}= ?'([\d.]{1,12})'", text, re.MULTILINE)
    return match[1] if match else None


def _bitsandbytes_backends() -> tuple[str, ...]:
    folder = _folder("bitsandbytes")
    if folder is None:
        return ()
    names = (path.name.split(".")[0].removeprefix("lib") for path in folder.glob("libbitsandbytes_*"))
    return tuple(sorted({name.removeprefix("bitsandbytes_") for name in names}))


def _gpus() -> tuple[tuple[str, ...], str | None]:
    from memplan.gpus.probe import probe_cards

    try:
        cards = probe_cards()
    except MemplanError as error:
        return (), error.context or error.message
    return tuple(
        f"{card.name}, {format_bytes(card.total_bytes)}, {format_bytes(card.used_bytes)} in use"
        for card in cards
    ), None
