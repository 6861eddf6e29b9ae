"""What a process takes of a card beside torch's allocator: the CUDA context and its libraries' modules."""

from __future__ import annotations

from memplan.request.types import CardSpec

H100_BYTES = 804_061_184
"""Device memory in use less torch's reserved bytes, after training steps with cuBLAS and cuDNN loaded.

Measured on an H100 80GB HBM3, driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130: the same to the byte in
three runs without a second process, from 0.5B to 70B parameters.
"""

_MEASURED_ON = "H100 80GB HBM3"


def non_torch_bytes(card: CardSpec) -> tuple[int, str]:
    """Bytes of `card` that torch does not manage, and how they are known."""
    if _MEASURED_ON in card.name:
        return H100_BYTES, "measured on an H100 (driver 580, CUDA 13.0, torch 2.11)"
    return H100_BYTES, "an estimate: measured on an H100, not on this card"
