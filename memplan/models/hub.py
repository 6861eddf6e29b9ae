"""A model on the Hugging Face hub: its `config.json`, and one safetensors header where that states no dtype.

Everything goes through huggingface_hub: its cache, its offline mode, its token, its endpoint. It is
imported when a model is looked up, since that takes longer than everything else here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from memplan.errors import MemplanError
from memplan.models import catalogue, config, headers
from memplan.models.types import ModelFacts
from memplan.names import listed, nearest, printable

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", re.ASCII)
_MAX_ID = 96
"""huggingface_hub's own bound on a repository's id."""
_REVISION = re.compile(r"[\w./-]{1,200}", re.ASCII)
_TIMEOUT_S = 10.0

_ELSEWHERE = "A directory or a `config.json` works without the hub"


@dataclass(frozen=True)
class _Ask:
    """What is looked up, ready to be quoted."""

    id: str
    revision: str | None
    token: str | None

    @property
    def shown(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def is_id(name: str) -> bool:
    """Whether the hub could have a model of that name: `NAME` or `ORGANISATION/NAME`."""
    return bool(_ID.fullmatch(name)) and len(name) <= _MAX_ID and ".." not in name and "--" not in name


def read(model_id: str, revision: str | None, token: str | None) -> ModelFacts:
    """The model of a hub id, at `revision` (a branch, tag or commit; `main` when None).

    Raises `model-not-found` (`unknown-model` for a name without organisation), `model-gated`,
    `revision-not-found`, `config-missing`, `model-is-adapter`, `hub-offline`, `hub-failed`, and what
    `config` raises for the file's content.
    """
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise MemplanError(
            "revision-not-found",
            f"`{printable(revision)}` is no revision",
            hint="Pass a branch, a tag or a commit of the model's repository",
        )
    ask = _Ask(model_id, revision, token)
    try:
        file, commit, note = _fetch(ask, "config.json")
    except MemplanError as error:
        raise _or_adapter(error, ask) from None
    where = f"{_host()}/{model_id}@{commit[:12]}"
    fields = config.parse(_bounded(file, where), f"config.json of {where}")
    config.check(fields, f"config.json of {where}")
    stated = config.checkpoint_dtype(fields)
    return ModelFacts(
        name=model_id,
        config=fields,
        source=where,
        checkpoint_dtype=stated or (None if note else _header_dtype(ask, commit)),
        hub_id=model_id,
        revision=commit,
        needs_remote_code=config.has_own_code(fields),
        quantized_with=config.quantized_with(fields),
        notes=(*config.notes_on(fields), *([note] if note else [])),
    )


def _fetch(ask: _Ask, filename: str) -> tuple[Path, str, str | None]:
    """The file in the cache, the commit that it is of, and a note where the hub itself could not be asked.

    One request tells existence, size and commit before anything is downloaded; huggingface_hub's own
    download would retry for half a minute without a network, and take a file of any size.
    """
    import httpx
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

    try:
        url = hf_hub_url(ask.id, filename, revision=ask.revision)
        metadata = get_hf_file_metadata(url, token=ask.token, timeout=_TIMEOUT_S)
        if metadata.commit_hash is None:
            raise _failed(
                ask, "The answer is not a hub's: it names no commit; check `HF_ENDPOINT` and the proxy"
            )
        if metadata.size is not None and metadata.size > config.MAX_BYTES:
            raise config.too_large(f"{filename} of {_host()}/{ask.shown}")
        cached = _cached(ask, filename, metadata.commit_hash)
        return cached or _download(ask, filename), metadata.commit_hash, None
    except (RemoteEntryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(ask, error) from None
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        if (cached := _cached(ask, filename, ask.revision)) is None:
            raise _refused(ask, error) from None
        return cached, cached.parent.name, "the hub could not be asked; the config is the cached one"


def _cached(ask: _Ask, filename: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(ask.id, filename, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _download(ask: _Ask, filename: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    group = "huggingface_hub.http_get"
    disable_progress_bars(group)
    try:
        return Path(hf_hub_download(ask.id, filename, revision=ask.revision, token=ask.token))
    finally:
        enable_progress_bars(group)


def _bounded(file: Path, where: str) -> bytes:
    with file.open("rb") as stream:
        raw = stream.read(config.MAX_BYTES + 1)
    if len(raw) > config.MAX_BYTES:
        raise config.too_large(where)
    return raw


def _header_dtype(ask: _Ask, commit: str) -> str | None:
    """The checkpoint's dtype by the header of its first safetensors file; None where none can be read."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError, SafetensorsParsingError

    def dtype_of(filename: str) -> str | None:
        found = HfApi().parse_safetensors_file_metadata(ask.id, filename, revision=commit, token=ask.token)
        return headers.first_dtype({name: tensor.dtype for name, tensor in found.tensors.items()})

    try:
        try:
            return dtype_of("model.safetensors")
        except EntryNotFoundError:
            index = _download(replace(ask, revision=commit), "model.safetensors.index.json")
            shards = headers.index_shards(index)
            return dtype_of(shards[0]) if shards else None
    except (EntryNotFoundError, NotASafetensorsRepoError, SafetensorsParsingError, OSError, httpx.HTTPError):
        return None


def _refused(ask: _Ask, error: Exception) -> MemplanError:
    """What the hub's refusal means for the user."""
    import httpx
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _offline(ask, "offline mode is on (`HF_HUB_OFFLINE`)")
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return _gated(ask)
    if isinstance(error, errors.RevisionNotFoundError):
        return MemplanError(
            "revision-not-found",
            f"`{ask.id}` has no revision `{ask.revision or 'main'}`",
            hint="Pass a branch, a tag or a commit of the model's repository",
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return _without_config(ask)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return unknown(ask.id) if "/" not in ask.id else _not_found(ask)
    if status is not None:
        return _failed(ask, f"It answered with HTTP status {status}")
    if isinstance(error, httpx.TimeoutException):
        return _offline(ask, f"{_host()} does not answer within {_TIMEOUT_S:.0f} s")
    if isinstance(error, OSError) and error.strerror:  # the cache's disk, not the network
        return _failed(ask, f"The cache cannot be used: {printable(error.strerror)}")
    return _offline(ask, f"{_host()} cannot be reached")


def unknown(name: str) -> MemplanError:
    """The error for a name that is no path, not in the catalogue and not on the hub; near names offered."""
    near = catalogue.near(name)
    meant = f"Did you mean {listed(near)}? " if near else ""
    return MemplanError(
        "unknown-model",
        f"no model is called `{printable(name)}`",
        context=f"It is neither a path, nor a name in the catalogue, nor a model on {_host()}",
        hint=f"{meant}{_ELSEWHERE}",
    )


def _not_found(ask: _Ask) -> MemplanError:
    near = catalogue.near(ask.id)
    meant = f"Did you mean {listed(near)}? " if near else ""
    return MemplanError(
        "model-not-found",
        f"{_host()} has no model `{ask.id}`, or keeps it private",
        hint=f"{meant}A private model needs a token (`--token`, `HF_TOKEN` or `hf auth login`)",
    )


def _gated(ask: _Ask) -> MemplanError:
    known = catalogue.find(ask.id)
    ours = "; without `--revision` the catalogue's config is used" if known and known.has_config else ""
    return MemplanError(
        "model-gated",
        f"`{ask.id}` is gated: the hub gives its files only to accounts that were granted access",
        hint=f"Ask for access at {_host()}/{ask.id} and pass a token of that account"
        f" (`--token`, `HF_TOKEN` or `hf auth login`){ours}",
    )


def _without_config(ask: _Ask) -> MemplanError:
    return MemplanError(
        "config-missing",
        f"`{ask.shown}` has no `config.json` on {_host()}",
        context="Repositories of GGUF files, of diffusers pipelines and of tokenizers have none",
        hint=f"Pass the id of the model that it was made from. {_ELSEWHERE}",
    )


def _or_adapter(error: MemplanError, ask: _Ask) -> MemplanError:
    """A repository without `config.json` may be an adapter's: then that is said, with its base model."""
    if error.reference != "config-missing":
        return error
    try:
        file, _, _ = _fetch(ask, "adapter_config.json")
        return config.is_adapter(config.parse(_bounded(file, ask.shown), ask.shown), ask.id)
    except MemplanError:
        return error


def _failed(ask: _Ask, context: str) -> MemplanError:
    return MemplanError(
        "hub-failed",
        f"{_host()} failed to give the config of `{ask.shown}`",
        context=context,
        hint=f"Try again later. {_ELSEWHERE}",
    )


def _offline(ask: _Ask, why: str) -> MemplanError:
    near = catalogue.near(ask.id)
    meant = f"The catalogue, which needs no network, has {listed(near, 'and')}. " if near else ""
    return MemplanError(
        "hub-offline",
        f"`{ask.shown}` cannot be looked up: {why}",
        context=f"It is not in the catalogue, nor in the hub's cache{_cache_content(ask.id)}",
        hint=f"{meant}{_ELSEWHERE}",
    )


def _cache_content(model_id: str) -> str:
    """Which models the cache does hold, the nearest names first."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    try:
        folders = sorted(entry.name for entry in os.scandir(cache) if entry.name.startswith("models--"))
    except OSError:
        return ""
    names = [
        folder.removeprefix("models--").replace("--", "/", 1)
        for folder in folders
        if next((cache / folder).glob("snapshots/*/config.json"), None)
    ]
    shown = dict.fromkeys([*nearest(model_id, names, 3), *names])
    return f", which holds {listed([printable(name) for name in list(shown)[:3]], 'and')}" if shown else ""


def _host() -> str:
    """The hub's host as the user has set it (`HF_ENDPOINT`)."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return printable(endpoint.partition("://")[2].rstrip("/") or endpoint)
