"""The value of PYTORCH_ALLOC_CONF, and what its settings do to a request."""

from __future__ import annotations

import pytest

from memplan.allocator import Allocator, AllocConf
from memplan.errors import MemplanError
from memplan.units import MIB


@pytest.mark.parametrize(
    ("text", "conf"),
    [
        (None, AllocConf()),
        ("", AllocConf()),
        ("expandable_segments:True", AllocConf(expandable_segments=True)),
        (" max_split_size_mb : 128 ,", AllocConf(max_split_size_bytes=128 * MIB)),
        (
            "large_segment_size_mb:40,pinned_use_background_threads:True,garbage_collection_threshold:0.8",
            AllocConf(
                large_segment_size_bytes=40 * MIB,
                max_non_split_rounding_bytes=40 * MIB,
                garbage_collection_threshold=0.8,
            ),
        ),
        ("backend:native,per_process_memory_fraction:0.5", AllocConf(per_process_memory_fraction=0.5)),
        ("roundup_power2_divisions:4", AllocConf(roundup_power2_divisions=(4,) * 16)),
        (
            "roundup_power2_divisions:[64:8,256:4,1024:4,>:1]",
            AllocConf(roundup_power2_divisions=(8,) * 7 + (0, 4, 0, 4) + (1,) * 5),
        ),
        ("roundup_power2_divisions:[>:4]", AllocConf(roundup_power2_divisions=(0,) + (4,) * 15)),
    ],
)
def test_settings_are_read_as_torch_reads_them(text: str | None, conf: AllocConf) -> None:
    """The expected tables are what libc10 of torch 2.13 made of the same texts."""
    assert AllocConf.parse(text) == conf


@pytest.mark.parametrize(
    "text",
    [
        "expandable_segments",
        "expandable_segments:true",
        "expandable_segments:True,,",
        "expandable_segment:True",
        "max_split_size_mb:19",
        "max_split_size_mb:1.5",
        "max_split_size_mb:30,large_segment_size_mb:40",
        "max_non_split_rounding_mb:10",
        "large_segment_size_mb:10",
        "garbage_collection_threshold:1.0",
        "garbage_collection_threshold:0",
        "garbage_collection_threshold:nan",
        "roundup_power2_divisions:3",
        "roundup_power2_divisions:[100:2]",
        "roundup_power2_divisions:[256]",
        "roundup_power2_divisions:[256:1",
        "backend:cudaMallocAsync",
    ],
)
def test_settings_that_torch_would_refuse_are_refused(text: str) -> None:
    with pytest.raises(MemplanError) as caught:
        AllocConf.parse(text)
    assert caught.value.reference == "bad-alloc-conf"


@pytest.mark.parametrize(
    ("divisions", "asked_mib", "block_mib"),
    [(4, 5, 5), (4, 9, 10), (8, 9, 9), (4, 8, 8), (1, 9, 9), (2, 100, 128), (16, 100, 100)],
)
def test_requests_are_rounded_between_powers_of_two(divisions: int, asked_mib: int, block_mib: int) -> None:
    conf = AllocConf.parse(f"roundup_power2_divisions:{divisions}")
    assert Allocator(conf=conf).malloc(1, asked_mib * MIB) == block_mib * MIB
