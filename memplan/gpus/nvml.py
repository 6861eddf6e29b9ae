"""NVML, asked in one place: an answer, or why there is none. No CUDA context is made.

A value that can't be had is an `Unknown`. It goes through every further question as it is, so nothing
unknown becomes a 0 or a guess on its way to the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from memplan.errors import ExitCode, MemplanError
from memplan.names import printable

T = TypeVar("T")

HINT = "Name the cards to plan for, e.g. `--gpus 2xRTX4090` or `--gpus 3x23.64GiB`"

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 3, 4, 6
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND = 9, 12, 13
GPU_IS_LOST, RESET_REQUIRED, VERSION_MISMATCH = 15, 16, 18
"""`nvmlReturn_t` of nvml.h; the same in every driver."""

_REASONS = {
    NOT_SUPPORTED: "not supported",
    NO_PERMISSION: "no permission",
    FUNCTION_NOT_FOUND: "this driver can't tell",
    GPU_IS_LOST: "the GPU is lost",
    RESET_REQUIRED: "the GPU needs a reset",
}


@dataclass(frozen=True)
class Unknown:
    """A value that could not be had, why, and NVML's error code where that is the cause."""

    reason: str
    code: int | None = None


def known(value: T | Unknown) -> T | None:
    """The value, or None where it is unknown."""
    return None if isinstance(value, Unknown) else value


def derived(function: Callable[..., T], *values: Any) -> T | Unknown:
    """`function` of values that are all known; else the first that isn't."""
    for value in values:
        if isinstance(value, Unknown):
            return value
    return function(*values)


@dataclass(frozen=True)
class Nvml:
    """An open connection to the driver."""

    library: Any
    """The module `pynvml`."""

    def ask(self, function: str, *arguments: Any, **options: Any) -> Any:
        """What `function` answers, or an `Unknown`: the one place that calls NVML. It never raises."""

        def call(*values: Any) -> Any:
            try:
                return getattr(self.library, function)(*values, **options)
            except self.library.NVMLError as error:
                return _unknown(error)
            except (AttributeError, TypeError):  # pynvml is older than the question
                return Unknown("this version of nvidia-ml-py can't ask")
            except UnicodeDecodeError:
                return Unknown("the driver's answer is no text")

        return derived(call, *arguments)

    def text(self, function: str, *arguments: Any) -> str | Unknown:
        """The same for a name, which some versions of pynvml give as bytes."""
        return derived(_text, self.ask(function, *arguments))


@contextmanager
def connection() -> Iterator[Nvml]:
    """NVML, open. Raises a `MemplanError` that says what is missing: package, driver or permission."""
    try:
        import pynvml
    except ImportError:
        raise no_gpu("The Python package `nvidia-ml-py` is not installed") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _no_start(error) from None
    try:
        yield Nvml(pynvml)
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def no_gpu(context: str) -> MemplanError:
    """The error where there is no card to look at."""
    return MemplanError(
        "no-gpu-found", "no GPU was found on this machine", context, HINT, exit_code=ExitCode.BAD_INPUT
    )


def _no_start(error: Exception) -> MemplanError:
    code = getattr(error, "value", None)
    if code == LIBRARY_NOT_FOUND:
        return no_gpu("NVML, which comes with NVIDIA's driver, is not installed (libnvidia-ml.so.1)")
    if code == DRIVER_NOT_LOADED:
        return no_gpu("NVIDIA's driver is installed but not loaded")
    if code == NO_PERMISSION:
        return MemplanError(
            "no-gpu-permission",
            "this user may not ask the GPU driver",
            "NVML answers `no permission`; /dev/nvidiactl must be readable and writable, in a container too",
            HINT,
            exit_code=ExitCode.UNKNOWN,
        )
    if code == VERSION_MISMATCH:
        return MemplanError(
            "gpu-driver-mismatch",
            "NVIDIA's driver and its library are of different versions",
            "The driver was updated while the old one is still loaded",
            "Reboot, or load the driver's modules anew",
            exit_code=ExitCode.UNKNOWN,
        )
    return no_gpu(f"NVML does not start: {printable(str(error))}")


def _unknown(error: Exception) -> Unknown:
    code = getattr(error, "value", None)
    return Unknown(_REASONS.get(code or 0) or printable(str(error)).lower(), code)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
