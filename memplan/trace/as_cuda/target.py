"""The card whose kernels the trace assumes."""

from __future__ import annotations

from dataclasses import dataclass

from memplan.request.types import CardSpec

H100_MULTIPROCESSORS = 132
"""cudaDevAttrMultiProcessorCount of the H100 SXM that the measured rows come from."""

# Multiprocessors of the largest chip of each compute capability, where the card itself is not known: they
# only set the size of a few reduction buffers. NVIDIA's architecture whitepapers (A100, GA102, AD102, H100).
_MULTIPROCESSORS = {(7, 0): 80, (7, 5): 72, (8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148}


@dataclass(frozen=True)
class CudaTarget:
    """What kernel choices and workspace sizes depend on."""

    compute_capability: tuple[int, int] = (9, 0)
    multiprocessor_count: int = H100_MULTIPROCESSORS

    @classmethod
    def of(cls, card: CardSpec | None) -> CudaTarget:
        """The target for a card; an H100, which everything was measured on, where it is not known."""
        if card is None:
            return cls()
        capability = card.compute_capability or (9, 0)
        count = card.multiprocessor_count or _MULTIPROCESSORS.get(capability, H100_MULTIPROCESSORS)
        return cls(capability, count)
