"""The cards: their catalogue and `--gpus`; every error by its exact text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import ExitCode, MemplanError
from memplan.gpus import catalogue
from memplan.gpus.catalogue import card, gpus, match, named, torch_total
from memplan.gpus.context import H100_BYTES, non_torch_bytes
from memplan.gpus.parse import parse_cards
from memplan.request.types import CardSpec
from memplan.units import GIB, MIB

HOW = (
    "Write a size or a name, with a count before it and commas between: "
    "`3x23.64GiB`, `2xRTX4090`, `2xA100-80GB,1xL4`"
)
SIZE_WORKS = "A size works for any card, e.g. `--gpus 23.64GiB`"


def error_of(call: Any, *arguments: Any) -> tuple[str, str, str | None, str | None]:
    with pytest.raises(MemplanError) as caught:
        call(*arguments)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    return caught.value.reference, caught.value.message, caught.value.context, caught.value.hint


# --- the catalogue -----------------------------------------------------------------------------------------


def test_every_card_by_each_of_its_names() -> None:
    assert len(gpus()) == 98
    for gpu in gpus():
        for name in (gpu.id, gpu.name, *gpu.aliases, f"NVIDIA {gpu.name}", gpu.id.upper()):
            assert named(name) == (gpu,), name
        if gpu.torch_bytes is None:
            assert error_of(card, gpu.id)[0] == "gpu-total-unknown"
        else:
            assert card(gpu.name).total_bytes == gpu.torch_bytes
            assert gpu.smi_bytes is None or gpu.torch_bytes < gpu.smi_bytes or gpu.id == "a40"


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("RTX4090", "GeForce RTX 4090"),
        ("rtx-4090", "GeForce RTX 4090"),
        ("4090", "GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("RTX4090-24GB", "GeForce RTX 4090"),
        ("RTX 4070TiSUPER", "GeForce RTX 4070 Ti SUPER"),
        ("H100", "H100 80GB HBM3 (SXM5)"),
        ("H100-80GB", "H100 80GB HBM3 (SXM5)"),
        ("h100 80g", "H100 80GB HBM3 (SXM5)"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3 (SXM5)"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("A100", "A100-SXM4-80GB"),
        ("A100-40GB", "A100-SXM4-40GB"),
        ("A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("Tesla T4", "Tesla T4"),
        ("T4", "Tesla T4"),
        ("a6000", "RTX A6000"),
        ("RTX 6000 Ada", "RTX 6000 Ada Generation"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell (Workstation/Max-Q/Server)"),
        ("RTX 3060 Ti", "GeForce RTX 3060 Ti"),
    ],
)
def test_names_as_people_and_nvml_write_them(typed: str, name: str) -> None:
    assert card(typed).name == name


def test_a_card_says_how_its_total_is_known() -> None:
    assert card("H100") == CardSpec(
        name="H100 80GB HBM3 (SXM5)",
        total_bytes=85_017_493_504,
        compute_capability=(9, 0),
        total_known="seen",
        multiprocessor_count=132,
    )
    assert card("rtx-5000-ada").total_known == "estimated"
    assert card("A10G").multiprocessor_count is None, "its sources disagree"


def test_errors_of_names() -> None:
    assert error_of(card, "RTX4O90") == (
        "unknown-gpu",
        "no GPU is called `RTX4O90` in the catalogue",
        None,
        f"Did you mean `rtx-4090`, `rtx-4090-d` or `rtx-5090`? {SIZE_WORKS}",
    )
    assert error_of(card, "Voodoo\x1b[31m") == (
        "unknown-gpu",
        "no GPU is called `Voodoo` in the catalogue",
        None,
        SIZE_WORKS,
    )
    assert error_of(card, "V100") == (
        "unknown-gpu",
        "`V100` names more than one GPU",
        "It is sold with 16 GB or 32 GB",
        "Say which: `v100-32gb` or `v100-16gb`",
    )
    assert error_of(card, "gb10") == (
        "gpu-total-unknown",
        "how much memory torch sees of `gb10` is not known",
        "It is less than the 128 GB that the card is sold with",
        "Give the size that torch reports on it instead of the name, e.g. `--gpus 23.64GiB`",
    )
    assert error_of(card, "GeForce RTX 4090 Laptop GPU")[0] == "unknown-gpu", "16 GB, not the desktop's 24"


# --- --gpus ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        ("3x23.64GiB", [("23.64GiB", 25_383_256_719)] * 3),
        ("23.64 GiB", [("23.64 GiB", 25_383_256_719)]),
        ("80GB", [("80GB (decimal, 74.51 GiB)", 80_000_000_000)]),
        ("24576MiB", [("24576MiB", 24 * GIB)]),
        ("2xRTX4090", [("GeForce RTX 4090", 24081 * MIB)] * 2),
        ("2 × 4090", [("GeForce RTX 4090", 24081 * MIB)] * 2),
        ("8*H100", [("H100 80GB HBM3 (SXM5)", 85_017_493_504)] * 8),
        ("2xA100-80GB, 1xL4", [("A100-SXM4-80GB", 81050 * MIB)] * 2 + [("L4", 22563 * MIB)]),
        ("L4", [("L4", 22563 * MIB)]),
    ],
)
def test_cards_as_people_write_them(text: str, cards: list[tuple[str, int]]) -> None:
    assert [(spec.name, spec.total_bytes) for spec in parse_cards(text)] == cards


@pytest.mark.parametrize(
    ("text", "context"),
    [
        ("24", "`24` is neither a size with its unit nor a GPU's name"),
        ("24G", "`24G` is neither a size with its unit nor a GPU's name"),
        ("-24GiB", "`-24GiB` is neither a size with its unit nor a GPU's name"),
        ("3x", "`3x` is neither a size with its unit nor a GPU's name"),
        ("x3", "`x3` is neither a size with its unit nor a GPU's name"),
        ("L4;L4", "`L4;L4` is neither a size with its unit nor a GPU's name"),
        ("L4,,L4", "A card is missing between the commas"),
        ("0xL4", "`0xL4` asks for no card"),
        ("1025xL4", "It asks for more than 1,024 cards"),
        ("1000xL4,25xL4", "It asks for more than 1,024 cards"),
        ("0GiB", "A card of `0GiB` has less than 256.0 MiB, which no GPU has"),
        ("23.64MiB", "A card of `23.64MiB` has less than 256.0 MiB, which no GPU has"),
        ("9TiB", "A card of `9TiB` has more than 4 TiB, which no GPU has"),
    ],
)
def test_errors_of_gpus(text: str, context: str) -> None:
    assert error_of(parse_cards, text) == ("bad-gpus", f"`--gpus {text}` cannot be read", context, HOW)


def test_errors_of_odd_text() -> None:
    assert error_of(parse_cards, " ") == ("bad-gpus", "`--gpus` is empty", None, HOW)
    assert error_of(parse_cards, "9" * 5000)[2] == "It is 5,000 characters long"
    assert error_of(parse_cards, "\x1b[31mL4\x1b]0;x\x07")[1] == "`--gpus L4` cannot be read"
    assert error_of(parse_cards, "2xH10O") == (
        "unknown-gpu",
        "no GPU is called `H10O` in the catalogue",
        None,
        f"Did you mean `h100-sxm`? {SIZE_WORKS}",
    )


KINDS = st.sampled_from([gpu for gpu in gpus() if gpu.torch_bytes]).map(lambda gpu: (gpu.id, gpu.torch_bytes))
SIZES = st.integers(256, 4 << 20).map(lambda mib: (f"{mib}MiB", mib * MIB))
ITEMS = st.lists(
    st.tuples(st.integers(1, 100), KINDS | SIZES, st.sampled_from("xX×*")), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(ITEMS)
def test_what_is_written_is_read_back(items: list[tuple[int, tuple[str, int], str]]) -> None:
    text = ", ".join(f"{count}{times}{name}" for count, (name, _), times in items)
    assert [spec.total_bytes for spec in parse_cards(text)] == [
        total for count, (_, total), _ in items for _ in range(count)
    ]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30) | st.text("0123456789xX×*,.gGiIbB -+", max_size=20))
def test_any_text_is_cards_or_one_error(text: str) -> None:
    try:
        assert all(256 * MIB <= spec.total_bytes <= 4 << 40 for spec in parse_cards(text))
    except MemplanError as error:
        assert error.reference in ("bad-gpus", "unknown-gpu", "gpu-total-unknown")
        assert all(c.isprintable() for c in error.message)


# --- beside torch ------------------------------------------------------------------------------------------


def test_the_context_says_where_it_was_measured() -> None:
    assert non_torch_bytes(card("H100")) == (
        H100_BYTES,
        "measured on an H100 (driver 580, CUDA 13.0, torch 2.11)",
    )
    assert non_torch_bytes(card("L4")) == (H100_BYTES, "an estimate: measured on an H100, not on this card")


def test_what_torch_sees_of_a_total() -> None:
    assert torch_total("NVIDIA H100 80GB HBM3", 81559 * MIB) == (85_017_493_504, True)
    assert torch_total("NVIDIA Something New", 100 * GIB) == (100 * GIB - 560 * MIB - 100 * GIB // 500, False)
    assert torch_total("NVIDIA Something New", MIB) == (0, False)


def test_a_probed_name_with_two_sizes_is_the_nearest() -> None:
    for gib, gpu_id in ((8, "rtx-4060-ti-8gb"), (16, "rtx-4060-ti-16gb")):
        found = match("NVIDIA GeForce RTX 4060 Ti", gib * GIB)
        assert found is not None and found.id == gpu_id
    assert match("NVIDIA Something New", GIB) is None
    assert catalogue.near("zzzzzzzz") == ()
