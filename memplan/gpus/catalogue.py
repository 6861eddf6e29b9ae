"""The GPUs that can be planned for without having them, and the names that people and NVML give them.

`gpus.json` holds one card a line: what nvidia-smi and torch report as its memory, with sources.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError
from memplan.names import listed, nearest, printable
from memplan.request.types import CardSpec
from memplan.units import MIB

_FILE = Path(__file__).with_name("gpus.json")

_MAKERS = re.compile(r"\b(?:nvidia|geforce|tesla|amd|intel|radeon|instinct|corporation)\b|\((?:r|tm)\)")
_SERIES = re.compile(r"^(?:rtx|gtx)(?=[a\d])")
_SEEN = ("lowest torch total seen", "torch total measured")
_SIZE = re.compile(r"\d+gb")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card of the catalogue; sizes in bytes, None where no source was found."""

    id: str
    name: str
    """As its vendor writes it, without the vendor."""
    aliases: tuple[str, ...]
    vendor: str
    nominal_gb: int
    smi_bytes: int | None
    """What NVML and nvidia-smi report as its total."""
    torch_bytes: int | None
    """What `torch.cuda.get_device_properties` reports: always less, the driver keeps the rest."""
    torch_bytes_seen: bool
    """Whether that was seen in torch's output, or estimated from `smi_bytes`."""
    compute_capability: tuple[int, int] | None
    multiprocessor_count: int | None
    sources: tuple[str, ...]


def gpus() -> tuple[Gpu, ...]:
    """All cards of the catalogue, in the file's order: data centre, workstation, consumer, other vendors."""
    return tuple(_all().values())


def named(name: str) -> tuple[Gpu, ...]:
    """The cards that a name can mean: none, one, or those that share it (`V100` has 16 or 32 GB)."""
    return tuple(_all()[gpu_id] for gpu_id in _names().get(_key(name), ()))


def near(name: str, count: int = 3) -> tuple[str, ...]:
    """Up to `count` ids that `name` may be a slip for, best first."""
    found: dict[str, None] = {}
    for key in nearest(_key(name), _names(), 3 * count):
        found.update(dict.fromkeys(_names()[key]))
    return tuple(found)[:count]


def card(name: str) -> CardSpec:
    """The card of that name, as torch sees it.

    Raises `unknown-gpu` (with near names, or with those that share the name) and `gpu-total-unknown`.
    """
    found = named(name)
    if len(found) != 1:
        raise _ambiguous(name, found) if found else _unknown(name)
    gpu = found[0]
    if gpu.torch_bytes is None:
        raise MemplanError(
            "gpu-total-unknown",
            f"how much memory torch sees of `{gpu.id}` is not known",
            context=f"It is less than the {gpu.nominal_gb} GB that the card is sold with",
            hint="Give the size that torch reports on it instead of the name, e.g. `--gpus 23.64GiB`",
        )
    return CardSpec(
        name=gpu.name,
        total_bytes=gpu.torch_bytes,
        compute_capability=gpu.compute_capability,
        total_known="seen" if gpu.torch_bytes_seen else "estimated",
        multiprocessor_count=gpu.multiprocessor_count,
    )


def match(nvml_name: str, smi_bytes: int) -> Gpu | None:
    """The entry of a card that NVML reports; of several with its name the one nearest in size."""
    found = [gpu for gpu in named(nvml_name) if gpu.smi_bytes is not None]
    return min(found, key=lambda gpu: abs((gpu.smi_bytes or 0) - smi_bytes), default=None)


def torch_total(nvml_name: str, nvml_total_bytes: int) -> tuple[int, bool]:
    """What torch will see of a card whose total NVML reports, and whether the difference was seen on that
    model: torch sees less, by what the driver keeps.

    For other cards it is taken as 560 MiB and 0.2 %, which covers it on every card seen with both figures
    (see `gpus.json`).
    """
    gpu = match(nvml_name, nvml_total_bytes)
    if gpu and gpu.smi_bytes and gpu.torch_bytes:
        return max(nvml_total_bytes - (gpu.smi_bytes - gpu.torch_bytes), 0), gpu.torch_bytes_seen
    return max(nvml_total_bytes - (560 * MIB + nvml_total_bytes // 500), 0), False


def _unknown(name: str) -> MemplanError:
    similar = near(name)
    meant = f"Did you mean {listed(similar)}? " if similar else ""
    return MemplanError(
        "unknown-gpu",
        f"no GPU is called `{printable(name.strip())}` in the catalogue",
        hint=f"{meant}A size works for any card, e.g. `--gpus 23.64GiB`",
    )


def _ambiguous(name: str, found: tuple[Gpu, ...]) -> MemplanError:
    sizes = " or ".join(f"{size} GB" for size in sorted({gpu.nominal_gb for gpu in found}))
    return MemplanError(
        "unknown-gpu",
        f"`{printable(name.strip())}` names more than one GPU",
        context=f"It is sold with {sizes}" if len({gpu.nominal_gb for gpu in found}) > 1 else None,
        hint=f"Say which: {listed(gpu.id for gpu in found)}",
    )


@cache
def _all() -> dict[str, Gpu]:
    lines = json.loads(_FILE.read_text(encoding="utf-8"))["gpus"]
    return {gpu_id: _gpu(gpu_id, line) for gpu_id, line in lines.items()}


def _gpu(gpu_id: str, line: dict[str, Any]) -> Gpu:
    total = line.get("plan_total_bytes") or (line["plan_total_mib"] and line["plan_total_mib"] * MIB)
    capability = line["compute_capability"]
    major, minor = map(int, capability.split(".")) if capability else (0, 0)
    return Gpu(
        id=gpu_id,
        name=line["name"],
        aliases=tuple(line["aliases"]),
        vendor=line["vendor"],
        nominal_gb=line["nominal_gb"],
        smi_bytes=line["nvidia_smi_mib"] and line["nvidia_smi_mib"] * MIB,
        torch_bytes=total,
        torch_bytes_seen=line["plan_total_basis"].startswith(_SEEN),
        compute_capability=(major, minor) if capability else None,
        multiprocessor_count=line["multiprocessor_count"],
        sources=tuple(line["sources"]),
    )


@cache
def _names() -> dict[str, tuple[str, ...]]:
    """Key → ids. A key that an entry states itself is its alone; derived ones may be shared."""
    stated: dict[str, dict[str, None]] = {}
    derived: dict[str, dict[str, None]] = {}
    for gpu in _all().values():
        keys = {_key(name) for name in (gpu.id, gpu.name, *gpu.aliases)}
        for key in keys:
            stated.setdefault(key, {})[gpu.id] = None
        for key in _derived(keys, gpu.nominal_gb) - keys:
            derived.setdefault(key, {})[gpu.id] = None
    return {key: tuple(found) for key, found in (derived | stated).items()}


def _derived(keys: set[str], nominal_gb: int) -> set[str]:
    """Keys with the size added or left out, and without the series: `rtx4090` → `rtx409024gb`, `4090`."""
    size = f"{nominal_gb}gb"
    sized = {key + size for key in keys if not _SIZE.search(key)} | {key.replace(size, "") for key in keys}
    return {derived for key in keys | sized for derived in (key, _SERIES.sub("", key)) if derived}


def _key(name: str) -> str:
    """One key for the spellings of a name: `NVIDIA GeForce RTX 4090` and `rtx-4090`, `80G` and `80 GB`."""
    words = _MAKERS.sub(" ", name[:200].casefold())
    glued = re.sub(r"[^a-z0-9]", "", words)
    return re.sub(r"(\d)gi?b?$", r"\1gb", glued)
