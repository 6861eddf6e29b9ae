"""`--gpus`: cards as people write them, `3x23.64GiB`, `2xRTX4090`, `2xA100-80GB,1xL4`."""

from __future__ import annotations

import re

from memplan.errors import MemplanError
from memplan.gpus.catalogue import card
from memplan.names import printable
from memplan.request.types import CardSpec
from memplan.units import GIB, MIB, format_bytes, parse_bytes

MOST_CARDS = 1024
LEAST_BYTES = 256 * MIB
"""Below it a card could not hold a CUDA context: the unit is a slip."""
MOST_BYTES = 4096 * GIB

_MOST_CHARACTERS = 4096
_COUNTED = re.compile(r"(\d{1,9})\s*[x×*✕]\s*(?=\S)(.*)", re.IGNORECASE | re.DOTALL)
_NO_NAME = re.compile(
    r"[-+]?[\d.]+\s*[kmgt]?i?b?"  # a size without its unit
    r"|[-+]\s*\d.*"
    r"|\d*\s*[x×*✕]|[x×*✕]\s*\d.*"  # a count without its card, a card without its count
    r"|.*[^\w\s()./+-].*|[^a-z]*",
    re.IGNORECASE | re.DOTALL,
)
_HOW = (
    "Write a size or a name, with a count before it and commas between:"
    " `3x23.64GiB`, `2xRTX4090`, `2xA100-80GB,1xL4`"
)


def parse_cards(text: str) -> tuple[CardSpec, ...]:
    """The cards of `--gpus`, in the order given, one entry a card.

    Sizes need their unit: GiB are 2**30 bytes, GB 10**9, and the card's name says so. A size is what torch
    sees of the card. Raises `bad-gpus` for what can't be read, a count or a size out of bounds, and
    `unknown-gpu` or `gpu-total-unknown` for a name.
    """
    if not text.strip():
        raise MemplanError("bad-gpus", "`--gpus` is empty", hint=_HOW)
    if len(text) > _MOST_CHARACTERS:
        raise _bad(text, f"It is {len(text):,} characters long")
    cards: list[CardSpec] = []
    for item in text.split(","):
        count, spec = _item(item.strip(), text)
        if len(cards) + count > MOST_CARDS:
            raise _bad(text, f"It asks for more than {MOST_CARDS:,} cards")
        cards += [spec] * count
    return tuple(cards)


def _item(item: str, text: str) -> tuple[int, CardSpec]:
    counted = _COUNTED.fullmatch(item)
    count, what = (int(counted[1]), counted[2].strip()) if counted else (1, item)
    if not what:
        raise _bad(text, "A card is missing between the commas" if "," in text else "It names no card")
    if count == 0:
        raise _bad(text, f"`{printable(item)}` asks for no card")
    if count > MOST_CARDS:
        raise _bad(text, f"It asks for more than {MOST_CARDS:,} cards")
    size_bytes = parse_bytes(what)
    return count, _named(what, text) if size_bytes is None else _sized(what, size_bytes, text)


def _sized(what: str, size_bytes: int, text: str) -> CardSpec:
    if not LEAST_BYTES <= size_bytes <= MOST_BYTES:
        limit = f"less than {format_bytes(LEAST_BYTES)}" if size_bytes < LEAST_BYTES else "more than 4 TiB"
        raise _bad(text, f"A card of `{printable(what)}` has {limit}, which no GPU has")
    shown = " ".join(what.split())
    if re.search(r"[kmgt]b$", shown, re.IGNORECASE):
        shown += f" (decimal, {format_bytes(size_bytes)})"
    return CardSpec(name=shown, total_bytes=size_bytes)


def _named(what: str, text: str) -> CardSpec:
    try:
        return card(what)
    except MemplanError:
        if _NO_NAME.fullmatch(what):
            context = f"`{printable(what)}` is neither a size with its unit nor a GPU's name"
            raise _bad(text, context) from None
        raise


def _bad(text: str, context: str) -> MemplanError:
    shown = printable(text.strip(), limit=60)
    return MemplanError("bad-gpus", f"`--gpus {shown}` cannot be read", context, _HOW)
