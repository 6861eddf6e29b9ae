"""What a process takes of a card beside torch's allocator: the CUDA context and its libraries' modules."""

from __future__ import annotations

from dataclasses import dataclass

from memplan.request.types import CardSpec
from memplan.units import MIB

H100_BYTES = 804_061_184
"""Device memory in use less torch's reserved bytes, after training steps with cuBLAS and cuDNN loaded.

Measured on an H100 80GB HBM3, driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130: the same to the byte in
three runs without a second process, from 0.5B to 70B parameters.
"""
LEAST_SEEN_BYTES = 117 * MIB
"""The least in users' out-of-memory messages, which give a process's memory and torch's share of it.

20 messages in GitHub issues and forums, of cards from 3.7 to 140 GiB: 117 to 749 MiB, so `H100_BYTES` is the
larger; two more, of 6.5 and 7.7 GiB, are of processes in which other libraries held memory too.
"""

_MEASURED_ON = "H100 80GB HBM3"


@dataclass(frozen=True, kw_only=True)
class Context:
    """Bytes beside torch's allocator: what is planned with, the least that it may be, and how it is known."""

    planned_bytes: int
    least_bytes: int
    how: str

    @property
    def is_measured(self) -> bool:
        """Whether there is nothing to doubt."""
        return self.planned_bytes == self.least_bytes


def context(card: CardSpec) -> Context:
    """The context of a card: measured, or the most that was seen on any, down to the least."""
    if _MEASURED_ON in card.name:
        how = "measured on an H100 (driver 580, CUDA 13.0, torch 2.11)"
        return Context(planned_bytes=H100_BYTES, least_bytes=H100_BYTES, how=how)
    how = "an estimate: measured on an H100, not on this card"
    return Context(planned_bytes=H100_BYTES, least_bytes=LEAST_SEEN_BYTES, how=how)


def non_torch_bytes(card: CardSpec) -> tuple[int, str]:
    """Bytes of `card` that torch does not manage, as planned with, and how they are known."""
    found = context(card)
    return found.planned_bytes, found.how
