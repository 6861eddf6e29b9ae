"""`memplan doctor`, and the command line of `diagnose` and `doctor` from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import oom_texts as texts
import pytest
from plans import CARD, founding_plan

import memplan.plan
from memplan.cli import app
from memplan.diagnosis.doctor import doctor, judged
from memplan.diagnosis.parse import diagnose
from memplan.diagnosis.replan import compare
from memplan.report.diagnosis import render_diagnosis, render_health

ROOT = Path(__file__).parents[1]
HEALTHY = {"torch": "2.11.0", "transformers": "4.40.0", "bitsandbytes": "0.50.2"}
CUDA = ("13.0", ("cpu", "cuda130"), ("H100, 79.18 GiB, 0 B in use",))


def memplan_process(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COLUMNS", "LC_", "LANG"))}
    return subprocess.run(
        [sys.executable, "-m", "memplan", *arguments],
        env=kept | {"LANG": "C.UTF-8", "PYTHONPATH": str(ROOT)} | environ,
        cwd="/",
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class TestDoctor:
    def test_nothing_wrong(self) -> None:
        health = judged(HEALTHY, *CUDA)
        assert health.problems == ()
        assert render_health(health).startswith("No known problem.\n\nEnvironment\n  python: ")

    @pytest.mark.parametrize(
        ("versions", "machine", "reference"),
        [
            ({"torch": "2.0.1"}, CUDA, "triu-tril-bfloat16"),
            ({"torch": "2.11.0", "deepspeed": "0.16.9", "accelerate": "0.34.2"}, CUDA, "zero-no-sync"),
            ({"torch": "2.5.1", "transformers": "4.56.2"}, CUDA, "torch-load-vulnerable"),
            ({"transformers": "5.17.0"}, CUDA, "no-torch"),
            (HEALTHY, (None, ("cpu",), CUDA[2]), "cpu-torch"),
            (HEALTHY, ("13.0", ("cpu", "cuda124"), CUDA[2]), "no-bitsandbytes-backend"),
            (HEALTHY, ("13.0", ("cpu",), (), "`CUDA_VISIBLE_DEVICES` hides every card"), "no-gpu"),
        ],
    )
    def test_what_would_break(self, versions: Any, machine: Any, reference: str) -> None:
        assert reference in {problem.reference for problem in judged(versions, *machine).problems}

    def test_renames_are_notes(self) -> None:
        health = judged({"torch": "2.11.0", "transformers": "5.17.0"}, *CUDA)
        assert health.problems == ()
        assert "trainer-tokenizer" in {note.id for note in health.notes}

    def test_this_environment(self) -> None:
        health = doctor()
        assert health.versions["torch"]
        assert json.loads(json.dumps(health.to_dict()))["python"] == health.python


class TestCommandLine:
    def test_file(self, tmp_path: Path) -> None:
        log = tmp_path / "run.log"
        log.write_text(texts.LOADING)
        process = memplan_process("diagnose", str(log))
        assert (process.returncode, process.stderr) == (0, "")
        assert process.stdout.startswith("GPU 2 ran out of memory while loading or placing the model: ")

    @pytest.mark.parametrize("arguments", [("diagnose",), ("diagnose", "-")])
    def test_standard_input(self, arguments: tuple[str, ...]) -> None:
        process = memplan_process(*arguments, "--format", "json", stdin=texts.SHARED)
        document = json.loads(process.stdout)
        assert (process.returncode, document["n_ooms"]) == (0, 1)
        assert document["events"][0]["cause"] == "other_process"

    def test_nothing_recognised(self) -> None:
        process = memplan_process("diagnose", stdin="all is well\n")
        assert process.returncode == 1
        assert process.stdout == (
            "Nothing in this text is a failure that memplan knows\n"
            "  hint Paste the whole output, from the start of the traceback to its last line\n"
        )

    def test_quiet(self) -> None:
        assert (
            memplan_process("diagnose", "--format", "quiet", stdin=texts.OLD).stdout
            == "cuda_oom unknown capacity\n"
        )

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (
                ("diagnose", "/no/such"),
                "error[no-such-file]: `/no/such` can't be read: no such file or directory\n",
            ),
            (("diagnose", "/"), "error[no-such-file]: `/` can't be read: is a directory\n"),
            (("diagnose", "x", "--paste"), "error[bad-usage]: FILE and `--paste` exclude each other\n"),
            (
                ("diagnose", "--use_peft"),
                (
                    "error[no-model]: `--use_peft` is given and no model\n"
                    "  why: a run can be planned again only if its model is known\n"
                    "  hint: Name it: `--model meta-llama/Llama-2-7b-hf`\n"
                ),
            ),
        ],
    )
    def test_bad_usage(self, arguments: tuple[str, ...], error: str) -> None:
        process = memplan_process(*arguments)
        assert (process.stdout, process.stderr, process.returncode) == ("", error, 2)

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        log = tmp_path / "run.log"
        log.write_bytes(b"\xff\xfe\x00\x80" + b"\x00\xff" * 100)
        assert memplan_process("diagnose", str(log)).returncode == 1

    def test_ascii(self) -> None:
        assert memplan_process("diagnose", stdin=texts.CURRENT, LANG="C").stdout.isascii()

    def test_colour_never_comes_from_the_text(self) -> None:
        process = memplan_process(
            "diagnose", stdin=f"\x1b]0;owned\x07\x1b[41m{texts.CURRENT}", FORCE_COLOR="1"
        )
        assert "\x1b[1;31mGPU 2" in process.stdout
        assert "owned" not in process.stdout and "\x1b[41m" not in process.stdout

    def test_the_start_is_quick_and_imports_nothing_heavy(self) -> None:
        script = (
            "import sys; from memplan.cli.app import run; run(['diagnose', sys.argv[1]])\n"
            "heavy = {'torch', 'rich', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", script, __file__], env=environ, check=True, capture_output=True
            )
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 0.25

    def test_doctor(self) -> None:
        process = memplan_process("doctor", "--format", "json")
        document = json.loads(process.stdout)
        assert process.returncode == (1 if document["problems"] else 0)
        assert memplan_process("doctor", "--fromat").returncode == 2


class TestReplan:
    def test_a_plan_that_agrees(self) -> None:
        plan = founding_plan()
        assert plan.failure is not None
        event = diagnose(texts.LOADING).events[0]
        same = replace(
            event.figures,
            allocated_bytes=plan.failure.allocated_bytes,
            reserved_bytes=plan.failure.reserved_bytes,
            reserved_unallocated_bytes=None,
        )
        phase = {"prepare": "load"}.get(plan.failure.phase, plan.failure.phase)
        answer = compare(plan, replace(event, figures=same, phase=phase))  # type: ignore[arg-type]
        assert (answer.agrees, answer.differences) == (True, ())

    def test_a_plan_that_does_not(self) -> None:
        plan = founding_plan()
        event = replace(diagnose(texts.OLD).events[0], phase="save")
        answer = compare(plan, event)
        assert answer.agrees is False
        assert any("the text fails in save" in difference for difference in answer.differences)

    def test_from_the_command_line(self, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
        asked: list[Any] = []

        def check(request: Any, **options: Any) -> Any:
            asked.append(request)
            return founding_plan()

        monkeypatch.setattr(memplan.plan, "check", check)
        log = tmp_path / "run.log"
        log.write_text(texts.LOADING)
        assert app.run(["diagnose", str(log), "--model", "llama-2-13b", "--use_peft", "--bf16"]) == 0
        request = asked[0]
        assert (request.model, request.use_peft, request.bf16) == ("llama-2-13b", True, True)
        assert [card.total_bytes for card in request.cards] == [
            diagnose(texts.CURRENT).events[0].figures.total_bytes
        ]
        assert "The same run planned: does not fit" in capsys.readouterr().out
        assert CARD.total_bytes

    def test_shown(self) -> None:
        diagnosis = diagnose(texts.LOADING)
        shown = render_diagnosis(replace(diagnosis, replan=compare(founding_plan(), diagnosis.events[0])))
        assert "The same run planned: does not fit" in shown
