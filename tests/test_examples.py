"""The examples and README say what memplan answers today."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "founding-case"


def command_of(path: Path) -> list[str]:
    found = re.search(r"memplan (check llama-2-13b .*)", path.read_text())
    assert found is not None
    return found[1].split()


def run(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "MEMPLAN_CACHE_DIR": str(cache), "PYTHONUTF8": "1"}
    environment.pop("PYTORCH_ALLOC_CONF", None)
    command = [sys.executable, "-m", "memplan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def without_times(text: str) -> str:
    """The answer without the versions and the seconds that close it."""
    return text[: text.rindex("For torch")]


def test_the_founding_case_answers_as_its_output_shows(cache: Path) -> None:
    done = run(command_of(EXAMPLE / "README.md"), cache)
    assert done.returncode == 1
    assert without_times(done.stdout) == without_times((EXAMPLE / "output.txt").read_text())
    assert "--load_in_4bit" in done.stderr
    assert "Warning" not in done.stderr


def test_readme_runs_the_same_command() -> None:
    assert command_of(ROOT / "README.md") == command_of(EXAMPLE / "README.md")


def test_asked_again_it_answers_from_the_cache_without_torch(cache: Path) -> None:
    arguments = [*command_of(EXAMPLE / "README.md"), "--format", "json"]
    first, second = run(arguments, cache), run(arguments, cache)
    one, other = json.loads(first.stdout), json.loads(second.stdout)
    assert other["cached"]
    for answer in (one, other):
        answer.pop("seconds")
        answer.pop("cached")
    assert one == other
    assert other["verdict"] == "does not fit"
    assert other["failure"]["phase"] == "load"
    assert other["alternatives"][0]["verdict"] == "fits"
    code = f"""
import contextlib, sys
from memplan.cli import main
sys.argv = ['memplan', *{arguments!r}]
with contextlib.suppress(SystemExit):
    main()
assert 'torch' not in sys.modules
"""
    environment = {**os.environ, "MEMPLAN_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, cwd=ROOT)


def test_a_damaged_cache_entry_is_ignored_with_a_note(cache: Path) -> None:
    arguments = [*command_of(EXAMPLE / "README.md"), "--format", "json"]
    run(arguments, cache)
    for entry in cache.glob("*.timeline"):
        entry.write_bytes(entry.read_bytes()[:-10])
    for entry in cache.glob("*.json"):
        entry.write_text("{")
    answer = json.loads(run(arguments, cache).stdout)
    assert answer["verdict"] == "does not fit"
    assert any("ignored a cache entry that can't be read" in note for note in answer["notes"])
