"""Bytes: inside they are `int`, GiB only where a person reads."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_FACTORS = {
    "b": 1,
    "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*([kmgt]i?b|b)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int | None:
    """Bytes of `23.64GiB`, `80 GB` or `512MiB`; None where the text is no size with its unit."""
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    return round(float(match[1]) * _FACTORS[match[2].lower()])


def gib(size_bytes: int) -> float:
    """The same size in GiB (2**30 bytes)."""
    return size_bytes / GIB


def format_bytes(size_bytes: int) -> str:
    """`9.47 GiB`, `766.8 MiB`, `512 B`: three significant figures or more, binary units."""
    magnitude = abs(size_bytes)
    if magnitude >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    if magnitude >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    if magnitude >= KIB:
        return f"{size_bytes / KIB:.1f} KiB"
    return f"{size_bytes} B"
