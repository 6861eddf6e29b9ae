"""Which model is meant: fields given directly, a path, a name in the catalogue, or an id on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from memplan.errors import MemplanError
from memplan.models import catalogue, config, hub, local
from memplan.models.types import ModelFacts
from memplan.names import printable

_GIVEN = "the config given"


def resolve(
    model: str | Mapping[str, Any],
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> ModelFacts:
    """What is true of a model before it is built.

    An existing path comes first, then the catalogue (which needs no network), then the hub. The hub is
    asked for a model of the catalogue only where its answer can differ: for a `revision`, or for the
    model's own code when `trust_remote_code` allows that. Weights are never read.

    Raises `MemplanError`, exit code 2: `unknown-model`, `path-not-found`, and what `local.read`,
    `hub.read`, `config.parse` and `config.check` raise.
    """
    if isinstance(model, Mapping):
        return _from_fields(model)
    if not model.strip():
        raise MemplanError(
            "unknown-model",
            "the model's name is empty",
            hint="Pass a hub id (`meta-llama/Llama-2-13b-hf`), a name in the catalogue (`llama-2-13b`),"
            " a directory or a `config.json`",
        )
    entry = catalogue.find(model)
    if path := local.existing(model):
        try:
            return local.read(path, model)
        except MemplanError as error:
            raise _or_catalogue(error, entry) from None
    if local.looks_like_path(model):
        raise MemplanError(
            "path-not-found",
            f"`{printable(model)}` does not exist",
            hint="Pass the model's directory or `config.json`, or its id on the hub",
        )
    if entry and entry.has_config and revision is None and (entry.is_native or not trust_remote_code):
        return catalogue.facts_of(entry, model)
    model_id = entry.meant if entry else model
    if not hub.is_id(model_id):
        raise hub.unknown(model)
    return hub.read(model_id, revision, token)


def _from_fields(fields: Mapping[str, Any]) -> ModelFacts:
    config.check(fields, _GIVEN)
    named = fields.get("_name_or_path")
    return ModelFacts(
        name=printable(named) if isinstance(named, str) and named else _GIVEN,
        config=dict(fields),
        source=_GIVEN,
        checkpoint_dtype=config.checkpoint_dtype(fields),
        needs_remote_code=config.has_own_code(fields),
        quantized_with=config.quantized_with(fields),
        notes=config.notes_on(fields),
    )


def _or_catalogue(error: MemplanError, entry: catalogue.Entry | None) -> MemplanError:
    """A directory that happens to be called like a model: say how to mean the model."""
    if error.reference != "config-missing" or entry is None or local.existing(entry.meant):
        return error
    return replace(error, hint=f"To mean the catalogue's model, write `{entry.meant}`")
