"""Who holds memory on a card, as far as the driver and /proc tell."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.gpus.nvml import FUNCTION_NOT_FOUND, Nvml, Unknown, derived
from memplan.names import printable

_ROOT = Path("/")
_INITIAL_NAMESPACE = 0xEFFFFFFC
"""`PROC_PID_INIT_INO`, include/linux/proc_ns.h of Linux."""
_SECRET = re.compile(r"(?i)(\S*(?:token|password|secret|api[-_]?key)[=\s])\S+|\bhf_\w{8,}")
"""What a command line may hold that must not be shown: values of such options, and hub tokens."""
_OUTSIDE = Unknown("the process is outside this container")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process with memory on a card."""

    pid: int
    user: str | Unknown
    command: str | Unknown
    used_bytes: int | Unknown


def processes_on(nvml: Nvml, handle: Any) -> tuple[Process, ...] | Unknown:
    """The processes that the driver shows, those that draw included, the largest first.

    Unknown where it refuses. From inside a container others' are left out, without a word from the driver.
    """
    found: dict[int, Any] = {}
    for kind in ("Compute", "Graphics"):
        listed = _ask(nvml, kind, handle)
        if isinstance(listed, Unknown):
            if kind == "Compute":
                return listed
            continue  # a card for computing alone has none that draw
        for entry in listed:
            found.setdefault(int(entry.pid), entry.usedGpuMemory)
    processes = (_process(pid, used) for pid, used in found.items())
    return tuple(sorted(processes, key=lambda p: -p.used_bytes if isinstance(p.used_bytes, int) else 0))


def _ask(nvml: Nvml, kind: str, handle: Any) -> Any:
    """The newest version of the call that the driver has."""
    for version in ("_v3", "_v2"):
        listed = nvml.ask(f"nvmlDeviceGet{kind}RunningProcesses{version}", handle)
        if not (isinstance(listed, Unknown) and listed.code in (FUNCTION_NOT_FOUND, None)):
            break
    return listed


def _process(pid: int, used: int | None) -> Process:
    is_here = shares_numbers() or has_device_open(pid)
    return Process(
        pid=pid,
        user=_user(pid) if is_here else _OUTSIDE,
        command=derived(
            lambda text: printable(_SECRET.sub(r"\1***", text)), _command(pid) if is_here else _OUTSIDE
        ),
        used_bytes=Unknown("the driver can't tell") if used is None else int(used),
    )


def shares_numbers(root: Path = _ROOT) -> bool:
    """Whether a process has the same number here as for the driver: not inside a container of its own."""
    try:
        return (root / "proc/self/ns/pid").readlink().name == f"pid:[{_INITIAL_NAMESPACE}]"
    except OSError:
        return False


def has_device_open(pid: int, root: Path = _ROOT) -> bool:
    """Whether the process of that number here uses a GPU; else the driver means another, of the host's."""
    try:
        entries = list((root / "proc" / str(pid) / "fd").iterdir())
        return any(str(entry.readlink()).startswith("/dev/nvidia") for entry in entries)
    except OSError:
        return False


def _user(pid: int) -> str | Unknown:
    try:
        owner = os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116 - no Path for one call
    except OSError:
        return _OUTSIDE
    try:
        import pwd

        return pwd.getpwuid(owner).pw_name
    except (ImportError, KeyError):
        return str(owner)


def _command(pid: int) -> str | Unknown:
    for name in ("cmdline", "comm"):
        try:
            raw = Path(f"/proc/{pid}/{name}").read_bytes()
        except OSError:
            continue
        text = raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()
        if text:
            return text
    return _OUTSIDE
