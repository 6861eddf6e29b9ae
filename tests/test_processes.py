"""Which process a number of the driver means."""

from __future__ import annotations

from pathlib import Path

from memplan.gpus.processes import has_device_open, shares_numbers


def test_in_a_container_a_number_counts_only_with_the_device_open(tmp_path: Path) -> None:
    for pid, target in ((7, "/dev/nvidiactl"), (8, "/dev/null")):
        (tmp_path / f"proc/{pid}/fd").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/fd/3").symlink_to(target)
    assert [has_device_open(pid, tmp_path) for pid in (7, 8, 9)] == [True, False, False]
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    namespace = tmp_path / "proc/self/ns/pid"
    for target, is_shared in (("pid:[4026531836]", True), ("pid:[4026532501]", False)):
        namespace.symlink_to(target)
        assert shares_numbers(tmp_path) is is_shared
        namespace.unlink()
    assert shares_numbers(tmp_path) is False
