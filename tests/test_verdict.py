"""Fits, tight, does not fit, unknown: where each begins, and the sentence for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plans import estimate, founding_request

from memplan.allocator import AllocConf
from memplan.estimate import Failure
from memplan.gpus.context import H100_BYTES, LEAST_SEEN_BYTES, context, non_torch_bytes
from memplan.plan.alternatives import as_options, changes
from memplan.plan.host import Host, host, host_notes
from memplan.plan.ranks import estimate_rank
from memplan.plan.verdict import capacity_bytes, judge
from memplan.report.words import change_text, torch_message
from memplan.request.types import CardSpec, Request
from memplan.timeline import Kind, Phase, Timeline
from memplan.units import GIB, KIB, MIB

CONF = AllocConf()


def timeline(*events: tuple[int, int], phases: tuple[Phase, ...] = (Phase("load", -1),)) -> Timeline:
    """(storage, MiB) is an allocation, (storage, 0) its end; all in the last phase."""
    made = Timeline(phases=list(phases), operators=["aten::empty"], modules=["model.layers.0"])
    for storage, mib in events:
        made.kind.append(Kind.ALLOC if mib else Kind.FREE)
        made.storage.append(storage)
        made.size_bytes.append(mib * MIB)
        made.phase.append(len(phases) - 1)
        made.operator.append(0)
        made.module.append(0)
        made.stream.append(0)
    made.category.extend([0] * (1 + max(storage for storage, _ in events)))
    return made


def card(total: int, name: str = "NVIDIA H100 80GB HBM3", used: int = 0) -> CardSpec:
    return CardSpec(name=name, total_bytes=total, used_bytes=used)


def verdict(
    made: Timeline, *cards: CardSpec, conf: AllocConf = CONF, weights: int = 0
) -> tuple[str, str, Failure | None]:
    request = founding_request(cards=cards, num_processes=len(cards))
    ranks = (estimate_rank(made, rank=i, card=each, conf=conf) for i, each in enumerate(cards))
    return judge(estimate(request, *ranks, facts={"weight_bytes": weights}), made, cards, conf)


# Held for long: 1000 MiB. Then 400 cached in pieces of 200, and 300 that no piece serves.
CACHING = ((0, 1000), (1, 200), (2, 200), (1, 0), (2, 0), (3, 300), (3, 0))
# A block of 400 MiB is cut for 100 that stay, so its rest can't be given back, and 350 don't go into it.
FRAGMENTED = ((0, 400), (0, 0), (1, 100), (2, 350))
STEPS = (Phase("load", -1), Phase("backward", 1))


def test_a_measured_card_fits_to_the_last_page() -> None:
    made = timeline((0, 1000))
    exactly = H100_BYTES + 1000 * MIB
    assert verdict(made, card(exactly))[:2] == (
        "fits",
        "takes 0.98 GiB reserved + 0.75 GiB CUDA context = 1.73 GiB of 1.73 GiB",
    )
    assert verdict(made, card(exactly - 512))[0] == "does not fit"


def test_what_others_hold_is_subtracted() -> None:
    made, total = timeline((0, 1000)), H100_BYTES + 1000 * MIB + GIB
    assert verdict(made, card(total, used=GIB))[:2] == (
        "fits",
        (
            "takes 0.98 GiB reserved + 0.75 GiB CUDA context + 1.00 GiB of other processes "
            "= 2.73 GiB of 2.73 GiB"
        ),
    )
    found, reason, failure = verdict(made, card(total, used=GIB + MIB), weights=1000 * MIB)
    assert (found, reason) == (
        "does not fit",
        (
            "it fails while loading: 1.0 GiB of bf16 weights do not go onto a 2.73 GiB card, of which other "
            "processes hold 1.00 GiB"
        ),
    )
    assert failure is not None and failure.capacity_bytes == 999 * MIB


def test_cached_memory_is_given_back_before_it_fails() -> None:
    made = timeline(*CACHING)
    assert verdict(made, card(H100_BYTES + 1700 * MIB))[1].startswith("takes 1.66 GiB reserved")
    assert verdict(made, card(H100_BYTES + 1400 * MIB))[:2] == (
        "fits",
        (
            "runs in the 1.37 GiB that torch may take, where it would reserve 1.66 GiB: torch gives cached "
            "memory back when the card is full"
        ),
    )
    assert verdict(made, card(H100_BYTES + 1398 * MIB))[0] == "does not fit"


def test_a_failure_by_fragmentation_says_so() -> None:
    made = timeline(*FRAGMENTED, phases=STEPS)
    found, reason, failure = verdict(made, card(H100_BYTES + 500 * MIB))
    assert (found, reason) == (
        "does not fit",
        (
            "it fails in the backward pass of step 2 on a 1.24 GiB card: 350.0 MiB more were asked for with "
            "0.10 of 0.49 GiB allocated, enough in all but in pieces: 0.29 GiB are reserved and unused"
        ),
    )
    assert failure is not None
    assert (failure.kind, failure.unused_bytes) == ("fragmentation", 300 * MIB)
    assert torch_message(failure) == (
        "CUDA out of memory. Tried to allocate 350.00 MiB. GPU 0 has a total capacity of 1.24 GiB of which "
        "100.00 MiB is free. Of the allocated memory 100.00 MiB is allocated by PyTorch, and 300.00 MiB is "
        "reserved by PyTorch but unallocated."
    )
    whole = verdict(made, card(H100_BYTES + 500 * MIB), conf=AllocConf.parse("expandable_segments:True"))
    assert whole[0] == "fits"


def test_fragments_are_answered_by_the_allocators_settings_first() -> None:
    first = next(changes(Request(model="m", use_peft=True), is_fragmented=True))
    assert first == {"alloc_conf": "expandable_segments:True"}
    assert as_options(first) == change_text(first) == "PYTORCH_ALLOC_CONF=expandable_segments:True"
    collected = Request(model="m", alloc_conf="garbage_collection_threshold:0.8")
    assert next(changes(collected, is_fragmented=True)) == {
        "alloc_conf": "garbage_collection_threshold:0.8,expandable_segments:True"
    }
    for request, is_fragmented in (
        (replace(collected, alloc_conf="expandable_segments:True"), True),
        (collected, False),
    ):
        assert all("alloc_conf" not in change for change in changes(request, is_fragmented=is_fragmented))


def test_a_failure_by_capacity_says_so() -> None:
    failure = verdict(timeline((0, 100), (1, 500)), card(H100_BYTES + 400 * MIB))[2]
    assert failure is not None and failure.kind == "capacity"


def test_a_fraction_in_the_allocators_settings_is_a_cap() -> None:
    made, half = timeline((0, 1000)), AllocConf.parse("per_process_memory_fraction:0.5")
    assert verdict(made, card(4 * GIB), conf=half)[0] == "fits"
    found, _, failure = verdict(made, card(1900 * MIB), conf=half)
    assert (found, failure and failure.capacity_bytes) == ("does not fit", 950 * MIB)


def test_tight_is_what_an_estimated_context_decides() -> None:
    made, other = timeline((0, 1000)), "NVIDIA L4"
    assert verdict(made, card(1000 * MIB + H100_BYTES, other))[0] == "fits"
    assert verdict(made, card(1000 * MIB + LEAST_SEEN_BYTES, other))[:2] == (
        "tight",
        (
            "it depends on the CUDA context, which was not measured on this card: it runs out while loading "
            "if torch may take 0.34 GiB, and runs in 0.98 GiB"
        ),
    )
    assert verdict(made, card(1000 * MIB + LEAST_SEEN_BYTES - MIB, other))[0] == "does not fit"


def test_tight_is_what_the_layout_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    import memplan.plan.verdict as module

    real = module.failure_under

    def fails_elsewhere(*arguments: object, layout: object, **options: object) -> object:
        is_default = layout == module.LAYOUTS[0]
        options["capacity_bytes"] = 2 * GIB if is_default else 0
        return real(*arguments, layout=layout, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "failure_under", fails_elsewhere)
    found, reason, failure = verdict(timeline(*CACHING), card(H100_BYTES + 1600 * MIB))
    assert (found, failure) == ("tight", None)
    assert reason == (
        "runs in the 1.56 GiB that torch may take, where it would reserve 1.66 GiB, but only with memory "
        "laid out as was measured: another driver's addresses may fragment it too much"
    )


def test_the_worst_card_decides() -> None:
    made = timeline((0, 1000))
    large, small = card(8 * GIB), card(GIB)
    found, _, failure = verdict(made, large, small)
    assert (found, failure and failure.rank) == ("does not fit", 1)
    assert verdict(made, large, card(9 * GIB))[1].endswith("of 8.00 GiB")
    edge = card(1000 * MIB + LEAST_SEEN_BYTES, "NVIDIA L4")
    assert verdict(made, large, edge)[0] == "tight"


def test_without_a_card_it_is_unknown() -> None:
    made = timeline((0, 1000))
    assert judge(estimate(), made, (), CONF)[0] == "unknown"


def test_the_founding_sentence() -> None:
    cards = (card(round(23.64 * GIB), "23.64GiB"),) * 3
    made = timeline(*((i, 1000) for i in range(25)))
    found, reason, failure = verdict(made, *cards, weights=round(24.24 * GIB))
    assert (found, reason) == (
        "does not fit",
        (
            "it fails while loading: each of the 3 processes puts 24.2 GiB of bf16 weights on its own 23.64 "
            "GiB card (data parallelism replicates the model, the cards do not add up)"
        ),
    )
    assert failure is not None and (failure.phase, failure.rank) == ("load", 0)


def test_the_context_and_its_bounds() -> None:
    measured, other = card(GIB), card(GIB, "NVIDIA L4")
    assert context(measured).is_measured and not context(other).is_measured
    assert non_torch_bytes(other)[0] == H100_BYTES
    assert capacity_bytes(measured) == (GIB - H100_BYTES,) * 2
    assert capacity_bytes(replace(other, used_bytes=MIB)) == (
        GIB - MIB - H100_BYTES,
        GIB - MIB - LEAST_SEEN_BYTES,
    )


# --- the host ----------------------------------------------------------------------------------------------


def files(root: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 65536 kB\nMemAvailable:   32768 kB\n"


def test_the_hosts_memory_without_a_limit(tmp_path: Path) -> None:
    found = host(files(tmp_path, proc__meminfo=MEMINFO))
    assert (found.available_bytes, found.is_limited, found.shm_bytes) == (32768 * KIB, False, None)
    assert host(tmp_path / "nowhere") == Host(available_bytes=None, is_limited=False, shm_bytes=None)


def test_a_limit_on_a_group_above_counts(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/a"
    files(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/a/b\n")
    files(group, **{"memory.max": f"{20 * MIB}\n", "memory.current": f"{15 * MIB}\n"})
    files(group, **{"memory.stat": f"anon 1\ninactive_file {3 * MIB}\n", "b__memory.max": "max\n"})
    assert (host(tmp_path).available_bytes, host(tmp_path).is_limited) == (8 * MIB, True)


def test_the_first_version_of_cgroups_in_a_container(tmp_path: Path) -> None:
    # The path is the host's; what is mounted is the container's own group.
    files(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="5:cpu:/x\n4:memory:/docker/abc\n")
    files(
        tmp_path / "sys/fs/cgroup/memory",
        **{"memory.limit_in_bytes": f"{10 * MIB}\n", "memory.usage_in_bytes": f"{4 * MIB}\n"},
    )
    assert host(tmp_path).available_bytes == 6 * MIB


def test_what_the_host_may_stop() -> None:
    small = Host(available_bytes=16 * GIB, is_limited=True, shm_bytes=64 * MIB)
    assert host_notes(small, weight_bytes=24 * GIB, processes=1) == (
        (
            "the host has 16.00 GiB of RAM left (a cgroup's limit): enough for weights that go straight onto "
            "the card (`device_map`), not for 24.00 GiB loaded through the CPU"
        ),
    )
    assert len(host_notes(small, weight_bytes=12 * GIB, processes=2)) == 2
    assert host_notes(small, weight_bytes=12 * GIB, processes=2)[1] == (
        "/dev/shm has 64.0 MiB free and NCCL shares memory there: a container needs `--shm-size=1g`"
    )
    unknown = Host(available_bytes=None, is_limited=False, shm_bytes=None)
    assert host_notes(unknown, weight_bytes=24 * GIB, processes=8) == ()
