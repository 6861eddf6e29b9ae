"""How the cards of a machine reach each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from memplan.gpus.nvml import NOT_SUPPORTED, Nvml, Unknown, derived

_MOST_NVLINKS = 36
"""`NVML_NVLINK_MAX_LINKS` of nvml.h."""
_INVALID_ARGUMENT = 2
_SWITCH = 2
"""`NVML_NVLINK_DEVICE_TYPE_SWITCH` of nvml.h."""
_P2P_NVLINK = 2
"""`NVML_P2P_CAPS_INDEX_NVLINK` of nvml.h; the answer 0 is OK."""
_PATHS = {0: "same board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""`nvmlGpuTopologyLevel_t` of nvml.h, in the words of `nvidia-smi topo`."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between two cards, by their NVML index: NVLinks in use, and the way over PCIe beside them."""

    cards: tuple[int, int]
    nvlinks: int | Unknown
    pcie: str | Unknown
    """PIX: one PCIe switch; PXB: several; PHB: the CPU's bridge; NODE: a NUMA node; SYS: across two."""


def links_between(nvml: Nvml, handles: Sequence[Any]) -> tuple[Link, ...]:
    """Every pair of cards."""
    if len(handles) < 2:
        return ()
    ends = [_nvlink_ends(nvml, handle) for handle in handles]
    buses = [derived(lambda pci: _key(pci.busId), nvml.ask("nvmlDeviceGetPciInfo", h)) for h in handles]
    return tuple(
        Link(
            cards=(a, b),
            nvlinks=derived(
                _shared,
                ends[a],
                buses[b],
                nvml.ask("nvmlDeviceGetP2PStatus", handles[a], handles[b], _P2P_NVLINK),
            ),
            pcie=derived(
                lambda level: _PATHS.get(level) or Unknown(f"level {level}"),
                nvml.ask("nvmlDeviceGetTopologyCommonAncestor", handles[a], handles[b]),
            ),
        )
        for a, b in combinations(range(len(handles)), 2)
    )


def _nvlink_ends(nvml: Nvml, handle: Any) -> tuple[str, ...] | Unknown:
    """Of each NVLink in use, what is at its other end: `switch` or a bus."""
    ends: list[str] = []
    for link in range(_MOST_NVLINKS):
        is_active = nvml.ask("nvmlDeviceGetNvLinkState", handle, link)
        if isinstance(is_active, Unknown):
            if is_active.code in (NOT_SUPPORTED, _INVALID_ARGUMENT):
                break  # the card has no such link
            return is_active
        if not is_active:
            continue
        if nvml.ask("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link) == _SWITCH:
            ends.append("switch")
            continue
        remote = nvml.ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
        if isinstance(remote, Unknown):
            return remote
        ends.append(_key(remote.busId))
    return tuple(ends)


def _shared(ends: tuple[str, ...], bus: str, status: int) -> int:
    direct = ends.count(bus)
    return direct or (ends.count("switch") if status == 0 else 0)


def _key(bus_id: str | bytes) -> str:
    """A bus without its domain's width, which differs between calls."""
    text = bus_id.decode("ascii", "replace") if isinstance(bus_id, bytes) else bus_id
    domain, _, rest = text.partition(":")
    return (
        f"{int(domain or '0', 16):x}:{rest.lower()}"
        if all(c in "0123456789abcdefABCDEF" for c in domain)
        else text
    )
