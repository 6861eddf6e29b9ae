"""A model on this disk: a directory or a `config.json`, or an error that says what is there instead."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from memplan.errors import MemplanError
from memplan.models import config as configs
from memplan.models.headers import directory_dtype
from memplan.models.types import ModelFacts
from memplan.names import listed, printable

_SHOWN_FILES = 5
_WEIGHTS = {
    ".gguf": "a GGUF file", ".safetensors": "a safetensors file", ".bin": "a file of weights",
    ".pt": "a file of weights", ".pth": "a file of weights", ".ckpt": "a file of weights",
}  # fmt: skip


def existing(model: str) -> Path | None:
    """The path that the user means, where one exists."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, no such home
        return None


def looks_like_path(model: str) -> bool:
    """Whether a name can only be meant as a path: no hub id starts or ends so."""
    if model.startswith(("./", "../", "/", "~", ".\\")) or model in (".", ".."):
        return True
    return model.endswith(("/", ".json", *_WEIGHTS))


def read(path: Path, typed: str) -> ModelFacts:
    """The model of an existing path; `typed` is how the user wrote it.

    Raises `config-missing`, `model-is-adapter`, `model-is-weights`, `path-unreadable`, and what `config`
    raises for the file's content.
    """
    try:
        return _read_directory(path, typed) if path.is_dir() else _read_file(path, typed)
    except OSError as error:
        raise MemplanError(
            "path-unreadable",
            f"`{printable(typed)}` cannot be read",
            context=error.strerror or type(error).__name__,
            hint="Check its permissions, or pass a copy that you may read",
        ) from None


def _read_directory(directory: Path, typed: str) -> ModelFacts:
    file = directory / "config.json"
    if file.is_file():
        return _facts(file, typed, directory)
    if (directory / "adapter_config.json").is_file():
        raise _is_adapter(directory / "adapter_config.json", typed)
    context, hint = _what_is_there(directory, typed)
    raise MemplanError("config-missing", f"`{printable(typed)}` has no `config.json`", context, hint)


def _read_file(path: Path, typed: str) -> ModelFacts:
    if kind := _WEIGHTS.get(path.suffix.lower()):
        beside = (path.parent / "config.json").is_file()
        raise MemplanError(
            "model-is-weights",
            f"`{printable(typed)}` is {kind}, not a model's config",
            context="The architecture is read from a `config.json`; weights are never read",
            hint=f"Pass its directory, which has one: `{printable(str(path.parent))}`"
            if beside
            else "Pass the model's directory or `config.json`, or its id on the hub",
        )
    if path.name == "adapter_config.json":
        raise _is_adapter(path, typed)
    return _facts(path, typed, path.parent)


def _facts(file: Path, typed: str, directory: Path) -> ModelFacts:
    where = printable(str(file))
    fields = configs.parse(_bounded(file, where), where)
    configs.check(fields, where)
    return ModelFacts(
        name=printable(typed),
        config=fields,
        source=where,
        checkpoint_dtype=configs.checkpoint_dtype(fields) or directory_dtype(directory),
        local_dir=directory,
        needs_remote_code=configs.has_own_code(fields),
        quantized_with=configs.quantized_with(fields),
        notes=configs.notes_on(fields),
    )


def _bounded(file: Path, where: str) -> bytes:
    # A pipe or a device never ends, or never starts.
    if not stat.S_ISREG(file.stat().st_mode):
        hint = "Pass the model's directory or `config.json`, or its id on the hub"
        raise MemplanError("config-missing", f"`{where}` is no regular file", hint=hint)
    with file.open("rb") as stream:
        raw = stream.read(configs.MAX_BYTES + 1)
    if len(raw) > configs.MAX_BYTES:
        raise configs.too_large(where)
    return raw


def _is_adapter(file: Path, typed: str) -> MemplanError:
    where = printable(str(file))
    try:
        return configs.is_adapter(configs.parse(_bounded(file, where), where), typed)
    except MemplanError:
        return configs.is_adapter({}, typed)


def _what_is_there(directory: Path, typed: str) -> tuple[str, str]:
    """What a directory without `config.json` holds, and what to do about it."""
    pass_model = "Pass the model's directory or `config.json`, or its id on the hub"
    names = sorted(entry.name for entry in os.scandir(directory))
    if not names:
        return "The directory is empty", pass_model
    within = [name for name in names if (directory / name / "config.json").is_file()]
    if within:
        shown = [printable(f"{typed.rstrip('/')}/{name}") for name in within[:_SHOWN_FILES]]
        return "Directories in it have one", f"Pass {listed(shown)}"
    for suffix, context in (
        (".gguf", "It holds GGUF files, which have no `config.json` beside them"),
        ("model_index.json", "It holds a diffusers pipeline, whose parts have their own configs"),
        ("params.json", "It holds a checkpoint in its authors' own layout (`params.json`)"),
    ):
        if any(name.endswith(suffix) for name in names):
            return context, "Pass the same model in Hugging Face's layout, or its id on the hub"
    has_weights = any(Path(name).suffix in _WEIGHTS for name in names)
    if not has_weights and any(name.startswith("tokenizer") for name in names):
        return "It holds a tokenizer only", pass_model
    files = listed([printable(name, limit=40) for name in names[:_SHOWN_FILES]], "and")
    first = "" if len(names) <= _SHOWN_FILES else f"{len(names)} files, the first "
    return f"It holds {first}{files}", pass_model
