"""Which cards a CUDA program started now would see, and under which ordinal.

Rules: "CUDA Environment Variables" in NVIDIA's CUDA C++ Programming Guide, and the MIG User Guide on CUDA's
device enumeration (one compute instance a process; none beside it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.gpus.nvml import Unknown


@dataclass(frozen=True)
class Device:
    """What CUDA can name: a card, or a MIG slice where `slice_of` is the index of its card in the list."""

    uuid: str | None
    name: str | None
    slice_of: int | None = None
    instances: tuple[int | None, int | None] = (None, None)
    """GPU and compute instance of a slice, which `MIG-GPU-<uuid>/gi/ci` names it by."""
    is_split: bool = False
    """Whether the card is in MIG mode: CUDA sees its slices, never itself."""


def ordinals(devices: Sequence[Device], environment: Mapping[str, str]) -> dict[int, int] | Unknown:
    """Place in `devices` → CUDA ordinal, for those that CUDA sees.

    Unknown where CUDA's own order decides, which puts the fastest card first and is not told otherwise.
    """
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        cards = [i for i, device in enumerate(devices) if device.slice_of is None]
        taken = _whole_list(devices, cards)
    else:
        taken = _listed(devices, wanted)
    by_order = wanted is None or any(_is_index(entry.strip()) for entry in wanted.split(","))
    if taken and by_order and not _order_is_known(devices, environment):
        return Unknown(
            "CUDA puts its fastest card first; CUDA_DEVICE_ORDER=PCI_BUS_ID would settle the order"
        )
    return {place: ordinal for ordinal, place in enumerate(taken)}


def visible(devices: Sequence[Device], environment: Mapping[str, str]) -> list[int]:
    """Places of what CUDA sees, in its order; in PCI order where CUDA's own isn't known."""
    found = ordinals(devices, {**environment, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    return [] if isinstance(found, Unknown) else sorted(found, key=found.__getitem__)


def _order_is_known(devices: Sequence[Device], environment: Mapping[str, str]) -> bool:
    """By the variable, or because the cards are alike; of cards beside one that is split none counts."""
    split = {device.slice_of for device in devices if device.slice_of is not None}
    competing = split if split and "CUDA_VISIBLE_DEVICES" not in environment else range(len(devices))
    names = {devices[i].name for i in competing if devices[i].slice_of is None}
    return environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or (len(names) == 1 and None not in names)


def _whole_list(devices: Sequence[Device], cards: Sequence[int]) -> list[int]:
    """Every card; but one slice alone, the first, as soon as some card has any."""
    slices = [i for i, device in enumerate(devices) if device.slice_of in cards]
    return slices[:1] or [i for i in cards if not devices[i].is_split]


def _listed(devices: Sequence[Device], wanted: str) -> list[int]:
    """What `CUDA_VISIBLE_DEVICES` selects: the first entry that names nothing ends it, one named twice
    leaves none."""
    taken: list[int] = []
    for entry in (part.strip() for part in wanted.split(",")):
        found = _named(devices, entry)
        if len(found) != 1:
            break
        if found[0] in taken:
            return []
        taken += found
    slices = [place for place in taken if devices[place].slice_of is not None]
    return slices[:1] or taken


def _named(devices: Sequence[Device], entry: str) -> list[int]:
    cards = [i for i, device in enumerate(devices) if device.slice_of is None]
    if _is_index(entry):
        chosen = [cards[int(entry)]] if int(entry) < len(cards) else []
        return _whole_list(devices, chosen)
    if entry.startswith("MIG-GPU-"):
        return [i for i, device in enumerate(devices) if _legacy_name(devices, device) == entry]
    if not entry.startswith(("GPU-", "MIG-")) or len(entry) <= 4:
        return []
    found = [i for i, device in enumerate(devices) if (device.uuid or "").startswith(entry)]
    return _whole_list(devices, found) if len(found) == 1 and devices[found[0]].slice_of is None else found


def _legacy_name(devices: Sequence[Device], device: Device) -> str | None:
    if device.slice_of is None or None in device.instances:
        return None
    return f"MIG-{devices[device.slice_of].uuid}/{device.instances[0]}/{device.instances[1]}"


def _is_index(entry: str) -> bool:
    return entry.isascii() and entry.isdigit() and len(entry) < 10
