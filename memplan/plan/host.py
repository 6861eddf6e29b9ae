"""The machine that the cards are in: memory that a process may still take, cgroup limits included."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from memplan.units import GIB, KIB, format_bytes

SHM_ADVISED_BYTES = GIB
"""NVIDIA's advice for containers, `--shm-size=1g`: NCCL User Guide, Troubleshooting, "Sharing Data"."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Bytes; None where this system doesn't tell."""

    available_bytes: int | None
    """RAM that can be had now: the system's or, where it is less, what the cgroup leaves."""
    is_limited: bool
    """Whether a cgroup decides it."""
    shm_bytes: int | None
    """Free in /dev/shm."""


def host(root: Path = Path("/")) -> Host:
    """This machine."""
    system, group = _system_bytes(root), _cgroup_bytes(root)
    is_limited = group is not None and (system is None or group < system)
    try:
        shm = os.statvfs(root / "dev/shm")
    except (OSError, AttributeError):
        shm = None
    return Host(
        available_bytes=group if is_limited else system,
        is_limited=is_limited,
        shm_bytes=None if shm is None else shm.f_bavail * shm.f_frsize,
    )


def host_notes(of: Host, *, weight_bytes: int, processes: int) -> tuple[str, ...]:
    """What of the host may stop a job that its cards would hold."""
    notes = []
    through_cpu = weight_bytes * processes
    if of.available_bytes is not None and of.available_bytes < through_cpu:
        limit = " (a cgroup's limit)" if of.is_limited else ""
        each = f"{processes} × " if processes > 1 else ""
        notes.append(
            f"the host has {format_bytes(of.available_bytes)} of RAM left{limit}: enough for weights that go"
            f" straight onto the card (`device_map`), not for {each}{format_bytes(weight_bytes)} loaded"
            " through the CPU"
        )
    if processes > 1 and of.shm_bytes is not None and of.shm_bytes < SHM_ADVISED_BYTES:
        notes.append(
            f"/dev/shm has {format_bytes(of.shm_bytes)} free and NCCL shares memory there: a container"
            " needs `--shm-size=1g`"
        )
    return tuple(notes)


def _system_bytes(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * KIB
    return None


def _cgroup_bytes(root: Path) -> int | None:
    """What is left of the tightest limit on this process's cgroup and those above it, versions 1 and 2.

    File pages count as used there but give way, so those not in use are taken as free.
    """
    left = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        limit, used, base = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", root / "sys/fs/cgroup/memory")
            if controllers
            else ("memory.max", "memory.current", root / "sys/fs/cgroup")
        )
        place = base / path.lstrip("/")
        # Inside a container the path is the host's, and the mount shows the container's own group.
        for group in {place, *place.parents, base}:
            if group == base or base in group.parents:
                left.append(_left(group, limit, used))
    known = [size for size in left if size is not None]
    return min(known, default=None)


def _left(group: Path, limit: str, used: str) -> int | None:
    texts = _read(group / limit).strip(), _read(group / used).strip()
    if not all(text.isdigit() for text in texts):  # `max`, or no such file
        return None
    inactive = 0
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            inactive = int(value)
    return max(int(texts[0]) - int(texts[1]) + inactive, 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
