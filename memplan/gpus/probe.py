"""The cards of this machine as the driver tells of them: what they are, what is on them, who holds it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memplan.errors import ExitCode, MemplanError
from memplan.gpus.catalogue import Gpu, match, torch_total
from memplan.gpus.links import Link, links_between
from memplan.gpus.nvml import (
    GPU_IS_LOST,
    HINT,
    NO_PERMISSION,
    NOT_FOUND,
    NOT_SUPPORTED,
    RESET_REQUIRED,
    Nvml,
    Unknown,
    connection,
    derived,
    known,
    no_gpu,
)
from memplan.gpus.processes import Process, processes_on
from memplan.gpus.visible import Device, ordinals, visible
from memplan.names import printable
from memplan.request.types import CardSpec

VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
_VIRTUALIZATION = ("none", "passthrough", "vgpu", "host vgpu", "host vsga")
"""`nvmlGpuVirtualizationMode_t` of nvml.h, in its order."""


@dataclass(frozen=True, kw_only=True)
class ProbedCard:
    """A GPU, or a MIG slice of one; bytes. What the driver doesn't tell is `Unknown`, never 0."""

    index: int | None
    """NVML's, which counts in PCI order; None for a slice."""
    ordinal: int | Unknown | None
    """CUDA's, in a program started with this environment; None where it would not see the card."""
    name: str | Unknown
    uuid: str | Unknown
    pci_bus_id: str | Unknown
    total_bytes: int | Unknown
    torch_total_bytes: int | Unknown
    """What `torch.cuda.mem_get_info` will report as the total."""
    torch_total_seen: bool
    """Whether the driver's share was seen on this model, or is an estimate."""
    reserved_bytes: int | Unknown
    """The driver's own, in no process and not in `used_bytes`; unknown to drivers before 510."""
    used_bytes: int | Unknown
    free_bytes: int | Unknown
    processes: tuple[Process, ...] | Unknown
    ecc: bool | Unknown
    compute_capability: tuple[int, int] | Unknown
    multiprocessor_count: int | None
    virtualization: str | Unknown
    mig: bool
    slices: tuple[ProbedCard, ...] = ()
    instances: tuple[int | None, int | None] = (None, None)
    """GPU and compute instance of a slice."""

    @property
    def bf16(self) -> bool | Unknown:
        """Whether its tensor cores take bfloat16: from Ampere (8.0) on."""
        return derived(lambda capability: bool(capability >= (8, 0)), self.compute_capability)

    @property
    def fp8(self) -> bool | Unknown:
        """Whether its tensor cores take fp8: from Ada (8.9) on."""
        return derived(lambda capability: bool(capability >= (8, 9)), self.compute_capability)

    @property
    def hidden_bytes(self) -> int | Unknown:
        """In use by nothing that can be seen from here: processes outside this container, or the driver."""
        if isinstance(self.processes, Unknown):
            return self.processes
        return derived(
            lambda used, *each: max(used - sum(each), 0),
            self.used_bytes,
            *(p.used_bytes for p in self.processes),
        )

    @property
    def is_lost(self) -> bool:
        """Whether the driver can't reach it any more."""
        codes = {GPU_IS_LOST, RESET_REQUIRED}
        return any(
            isinstance(v, Unknown) and v.code in codes for v in (self.uuid, self.total_bytes, self.used_bytes)
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The machine's cards, and the environment that decides which of them a program sees."""

    cards: tuple[ProbedCard, ...]
    links: tuple[Link, ...]
    driver: str | Unknown
    cuda: str | Unknown
    """The newest CUDA that the driver runs."""
    environment: Mapping[str, str]

    @property
    def visible(self) -> tuple[ProbedCard, ...]:
        """What a CUDA program started now would see, in its order; in PCI order where that isn't known."""
        places, devices = _flat(self.cards)
        return tuple(places[i] for i in visible(devices, self.environment))

    @property
    def is_complete(self) -> bool:
        """Whether the memory of every card that can be seen is known, and some can."""
        return bool(self.visible) and not any(
            isinstance(value, Unknown) for c in self.visible for value in (c.torch_total_bytes, c.used_bytes)
        )


def probe(*, with_links: bool = True) -> Probe:
    """Everything that the driver tells. Raises a `MemplanError` where there is no driver or no card."""
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    with connection() as nvml:
        count = nvml.ask("nvmlDeviceGetCount")
        if isinstance(count, Unknown):
            raise no_gpu(f"NVML does not count the cards: {count.reason}")
        if count == 0:
            raise no_gpu("The driver reports no card")
        handles = [nvml.ask("nvmlDeviceGetHandleByIndex", index) for index in range(count)]
        cards = tuple(_card(nvml, handle, index) for index, handle in enumerate(handles))
        return Probe(
            cards=_with_ordinals(cards, environment),
            links=links_between(nvml, handles) if with_links else (),
            driver=nvml.text("nvmlSystemGetDriverVersion"),
            cuda=derived(
                lambda version: f"{version // 1000}.{version % 1000 // 10}",
                nvml.ask("nvmlSystemGetCudaDriverVersion_v2"),
            ),
            environment=environment,
        )


def probe_cards() -> tuple[CardSpec, ...]:
    """The cards that a CUDA program started now would see, with what others hold on them.

    Raises `no-gpu-found` and `gpu-memory-unknown`, among others.
    """
    found = probe(with_links=False)
    if not found.visible:
        hidden = "CUDA_VISIBLE_DEVICES" in found.environment
        raise no_gpu(
            "`CUDA_VISIBLE_DEVICES` hides every card" if hidden else "MIG is on, and no slice is made"
        )
    return tuple(_spec(card) for card in found.visible)


def remarks(card: ProbedCard) -> tuple[str, ...]:
    """What a reader must know of the card to take its figures for what they are."""
    said = []
    memory = card.total_bytes
    if card.is_lost:
        said.append("lost: the driver can't reach it any more; a reset or a reboot may bring it back")
    elif isinstance(memory, Unknown) and memory.code == NOT_SUPPORTED:
        said.append("shares the system's memory, so the driver has no figures of its own for it")
    elif isinstance(memory, Unknown):
        said.append(f"its memory is unknown: {memory.reason}")
    if known(card.virtualization) == "vgpu":
        said.append(
            "a virtual GPU: the figures are of its share; other machines' use of the card is not seen"
        )
    if card.mig and not card.slices:
        said.append("MIG is on and no slice can be seen, so CUDA sees nothing of it")
    if isinstance(card.processes, Unknown) and card.processes.code == NO_PERMISSION:
        said.append("this user may not see its processes")
    hidden = known(card.hidden_bytes)
    if hidden and not card.slices:
        said.append("some memory is held by no process that is seen from here: a container hides the others'")
    return tuple(said)


def _card(nvml: Nvml, handle: Any, index: int | None, above: ProbedCard | None = None) -> ProbedCard:
    name, memory = nvml.text("nvmlDeviceGetName", handle), _memory(nvml, handle)
    total = derived(lambda m: int(m.total), memory)
    torch_sees = derived(torch_total, name, total)
    gpu = match(name, total) if isinstance(name, str) and isinstance(total, int) else None
    mode = nvml.ask("nvmlDeviceGetMigMode", handle) if above is None else [0, 0]
    card = ProbedCard(
        index=index,
        ordinal=None,
        name=name,
        uuid=nvml.text("nvmlDeviceGetUUID", handle),
        pci_bus_id=_bus_id(nvml, handle, above),
        total_bytes=total,
        torch_total_bytes=derived(lambda pair: pair[0], torch_sees),
        torch_total_seen=not isinstance(torch_sees, Unknown) and torch_sees[1],
        reserved_bytes=derived(_reserved, memory),
        used_bytes=derived(lambda m: int(m.used), memory),
        free_bytes=derived(lambda m: int(m.free), memory),
        processes=processes_on(nvml, handle),
        ecc=above.ecc if above else derived(lambda m: bool(m[0]), nvml.ask("nvmlDeviceGetEccMode", handle)),
        compute_capability=above.compute_capability if above else _capability(nvml, handle),
        multiprocessor_count=_multiprocessors(nvml, handle, above, gpu),
        virtualization=above.virtualization if above else _virtualization(nvml, handle),
        mig=not isinstance(mode, Unknown) and mode[0] == 1,
        instances=_instances(nvml, handle) if above else (None, None),
    )
    return replace(card, slices=_slices(nvml, handle, card)) if card.mig else card


def _memory(nvml: Nvml, handle: Any) -> Any:
    """`total`, `used`, `free`; the call's second version keeps the driver's own share out of `used`."""
    version = getattr(nvml.library, "nvmlMemory_v2", None)
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle, version=version)
    return nvml.ask("nvmlDeviceGetMemoryInfo", handle) if isinstance(memory, Unknown) else memory


def _reserved(memory: Any) -> int | Unknown:
    return int(memory.reserved) if hasattr(memory, "reserved") else Unknown("this driver can't tell")


def _bus_id(nvml: Nvml, handle: Any, above: ProbedCard | None) -> str | Unknown:
    if above is not None:
        return above.pci_bus_id
    return derived(_bus, nvml.ask("nvmlDeviceGetPciInfo", handle))


def _bus(pci: Any) -> str:
    return pci.busId.decode("ascii", "replace") if isinstance(pci.busId, bytes) else str(pci.busId)


def _capability(nvml: Nvml, handle: Any) -> tuple[int, int] | Unknown:
    return derived(lambda c: (int(c[0]), int(c[1])), nvml.ask("nvmlDeviceGetCudaComputeCapability", handle))


def _virtualization(nvml: Nvml, handle: Any) -> str | Unknown:
    mode = nvml.ask("nvmlDeviceGetVirtualizationMode", handle)
    return derived(lambda m: _VIRTUALIZATION[m] if m < len(_VIRTUALIZATION) else Unknown(f"mode {m}"), mode)


def _multiprocessors(nvml: Nvml, handle: Any, above: ProbedCard | None, gpu: Gpu | None) -> int | None:
    """Of a slice as the driver tells; of a whole card, which it doesn't, as the catalogue has it."""
    if above is None:
        return gpu.multiprocessor_count if gpu else None
    return known(derived(lambda a: int(a.multiprocessorCount), nvml.ask("nvmlDeviceGetAttributes", handle)))


def _instances(nvml: Nvml, handle: Any) -> tuple[int | None, int | None]:
    functions = ("nvmlDeviceGetGpuInstanceId", "nvmlDeviceGetComputeInstanceId")
    gpu, compute = (known(nvml.ask(function, handle)) for function in functions)
    return gpu, compute


def _slices(nvml: Nvml, handle: Any, card: ProbedCard) -> tuple[ProbedCard, ...]:
    count = known(nvml.ask("nvmlDeviceGetMaxMigDeviceCount", handle)) or 0
    handles = (nvml.ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(count))
    made = [h for h in handles if not (isinstance(h, Unknown) and h.code == NOT_FOUND)]
    return tuple(_card(nvml, each, None, card) for each in made)


def _flat(cards: Sequence[ProbedCard]) -> tuple[list[ProbedCard], list[Device]]:
    """Cards and slices in one list, and the same as CUDA names them."""
    places: list[ProbedCard] = []
    devices: list[Device] = []
    for card in cards:
        place = len(places)
        for each in (card, *card.slices):
            places.append(each)
            devices.append(
                Device(
                    uuid=known(each.uuid),
                    name=known(each.name),
                    slice_of=None if each is card else place,
                    instances=each.instances,
                    is_split=each.mig,
                )
            )
    return places, devices


def _with_ordinals(cards: Sequence[ProbedCard], environment: Mapping[str, str]) -> tuple[ProbedCard, ...]:
    _, devices = _flat(cards)
    found = ordinals(devices, environment)
    seen = set(visible(devices, environment))

    def numbered(card: ProbedCard, place: int) -> ProbedCard:
        if isinstance(found, Unknown):
            return replace(card, ordinal=found if place in seen else None)
        return replace(card, ordinal=found.get(place))

    result = []
    place = 0
    for card in cards:
        slices = tuple(numbered(each, place + 1 + i) for i, each in enumerate(card.slices))
        result.append(replace(numbered(card, place), slices=slices))
        place += 1 + len(slices)
    return tuple(result)


def _spec(card: ProbedCard) -> CardSpec:
    total, used = card.torch_total_bytes, card.used_bytes
    if isinstance(total, Unknown) or isinstance(used, Unknown):
        why = total if isinstance(total, Unknown) else used
        name = known(card.name) or f"card {card.index}"
        raise MemplanError(
            "gpu-memory-unknown",
            f"the driver does not tell the memory of {printable(name)}",
            context="; ".join(remarks(card)) or (why.reason if isinstance(why, Unknown) else None),
            hint=HINT,
            exit_code=ExitCode.UNKNOWN,
        )
    return CardSpec(
        name=known(card.name) or "unknown",
        total_bytes=total,
        compute_capability=known(card.compute_capability),
        total_known="probed" if card.torch_total_seen else "estimated",
        multiprocessor_count=card.multiprocessor_count,
        used_bytes=_others_bytes(card, total, used),
    )


def _others_bytes(card: ProbedCard, total: int, used: int) -> int:
    """What others hold of what torch sees; drivers before 510 count their own share as used too."""
    if isinstance(card.reserved_bytes, Unknown) and isinstance(card.free_bytes, int):
        return max(total - card.free_bytes, 0)
    return used
