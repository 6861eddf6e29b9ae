"""The command line from outside: exit codes, streams, spellings, and the words of its errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from plans import CARD, founding_plan

import memplan.plan
from memplan.cli import app, docs
from memplan.cli.check import exit_code
from memplan.errors import MemplanError
from memplan.request import CardSpec, Request

ROOT = Path(__file__).parents[1]

ROOT_HELP = "`memplan --help` shows what there is"
CHECK_HELP = "`memplan check --help` shows what there is"
MODEL_FIRST = "Put MODEL first, `memplan check MODEL`: a list option takes all words after it"


def memplan_process(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, outside any terminal."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTORCH_", "COLUMNS", "LC_", "LANG"))
    }
    return subprocess.run(
        [sys.executable, "-m", "memplan", *arguments],
        env=inherited | {"LANG": "C.UTF-8", "PYTHONPATH": str(ROOT)} | environ,
        cwd="/",
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The engine replaced by one that answers with a plan made by hand; the requests that it was asked."""
    asked: list[Request] = []

    def check(request: Request, **options: Any) -> Any:
        asked.append(request)
        if isinstance(engine_answers[0], BaseException):
            raise engine_answers[0]
        return engine_answers[0]

    def cards(text: str) -> tuple[CardSpec, ...]:
        return (CARD,) * int(text.partition("x")[0])

    monkeypatch.setattr(memplan.plan, "check", check, raising=False)
    for name, function in (("parse", "parse_cards"), ("probe", "probe_cards")):
        module = ModuleType(f"memplan.gpus.{name}")
        setattr(module, function, cards if name == "parse" else tuple)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    engine_answers[:] = [founding_plan()]
    return asked


engine_answers: list[Any] = []


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "hint"),
        [
            ("chekc", "bad-usage]: no such command `chekc`", ROOT_HELP),
            ("check", "no-model]: no MODEL is named", MODEL_FIRST),
            ("check m n", "bad-usage]: got unexpected extra argument (n)", CHECK_HELP),
            (
                "check m --lora_rank 8",
                "unknown-option]: no option is called `--lora_rank`",
                "Did you mean `--lora_r` or `--lora_alpha`?",
            ),
            ("check m --xyzzy", "unknown-option]: no option is called `--xyzzy`", CHECK_HELP),
            ("check m -x", "unknown-option]: no option is called `-x`", CHECK_HELP),
            (
                "check m --bf16=maybe",
                "bad-usage]: `--bf16`: `maybe` is neither `True` nor `False`",
                CHECK_HELP,
            ),
            (
                "check m --max-length 1e3",
                "bad-usage]: `--max_length`: `1e3` is not a valid integer",
                CHECK_HELP,
            ),
            (
                "check m --dtype bf16",
                "bad-usage]: `--dtype`: `bf16` is not one of `bfloat16`, `float16`, `float32`",
                CHECK_HELP,
            ),
            (
                "check m --format xml",
                "bad-usage]: `--format`: `xml` is not one of `auto`, `human`, `json`, `quiet`",
                CHECK_HELP,
            ),
            ("check m --gpus", "bad-usage]: option `--gpus` requires an argument", CHECK_HELP),
            (
                "check m --lora_target_modules --use_peft",
                "bad-usage]: `--lora_target_modules`: names no module",
                CHECK_HELP,
            ),
        ],
    )
    def test_bad_usage(self, arguments: str, error: str, hint: str) -> None:
        process = memplan_process(*arguments.split())
        text = f"error[{error}\n  hint: {hint}\n"
        assert (process.stdout, process.stderr, process.returncode) == ("", text, 2)

    def test_impossible_options_come_all_at_once(self, engine: list[Request], capsys: Any) -> None:
        code = app.run(["check", "m", "--gpus", "1x", "--bf16", "--fp16", "--max_length", "0"])
        out, err = capsys.readouterr()
        assert out == ""
        assert err == (
            "error[several-problems]: 2 problems with the request\n"
            "  why: `value-out-of-range`: `--max_length` can't be 0\n"
            "  why: `bf16-with-fp16`: `--bf16` and `--fp16` exclude each other\n"
            "  hint: `--max_length` takes a whole number from 1 to 2147483647\n"
            "  hint: Keep one: `--bf16` on Ampere or newer, `--fp16` on older cards\n"
        )
        assert (code, engine) == (2, [])

    def test_json_errors_are_all_there_is(self) -> None:
        process = memplan_process("check", "m", "--format=json", "--xyzzy")
        assert process.stderr == ""
        assert json.loads(process.stdout)["error"]["reference"] == "unknown-option"
        assert process.returncode == 2

    def test_a_fault_of_ours_is_short(self, engine: list[Request], capsys: Any, monkeypatch: Any) -> None:
        engine_answers[:] = [RuntimeError("broken")]
        assert app.run(["check", "m", "--gpus", "1x"]) == 70
        assert capsys.readouterr().err == (
            "error[internal-error]: memplan failed: RuntimeError: broken\n"
            "  note: This is a fault of memplan, not of your request\n"
            "  hint: Run it again with `MEMPLAN_TRACEBACK=1` and report what it shows\n"
        )
        monkeypatch.setenv("MEMPLAN_TRACEBACK", "1")
        with pytest.raises(RuntimeError, match="broken"):
            app.run(["check", "m", "--gpus", "1x"])

    def test_the_engine_s_errors_keep_their_exit_code(self, engine: list[Request], capsys: Any) -> None:
        from memplan.errors import ExitCode

        engine_answers[:] = [MemplanError("cannot-run", "stuck at `aten::x`", exit_code=ExitCode.UNKNOWN)]
        assert app.run(["check", "m", "--gpus", "1x"]) == 3
        assert capsys.readouterr().err == "error[cannot-run]: stuck at `aten::x`\n"

    def test_interrupted(self, engine: list[Request], capsys: Any) -> None:
        engine_answers[:] = [KeyboardInterrupt()]
        assert app.run(["check", "m", "--gpus", "1x"]) == 130
        assert "Traceback" not in capsys.readouterr().err

    def test_no_arguments_show_the_help_but_do_not_say_that_it_fits(self) -> None:
        process = memplan_process()
        assert process.stdout.startswith("Usage: memplan")
        assert process.returncode == 2


class TestAnswers:
    @pytest.mark.parametrize(
        ("verdict", "code"), [("fits", 0), ("tight", 0), ("does not fit", 1), ("unknown", 3), ("?", 3)]
    )
    def test_exit_codes(self, verdict: str, code: int) -> None:
        assert exit_code(verdict) == code

    def test_human(self, engine: list[Request], capsys: Any) -> None:
        assert app.run(["check", "m", "--gpus", "3x"]) == 1
        out, err = capsys.readouterr()
        assert out.splitlines()[1].strip("│ |") == "Does not fit"
        assert err == "hint: load the base in 4 bits: add `--load_in_4bit`\n"

    def test_json(self, engine: list[Request], capsys: Any) -> None:
        assert app.run(["check", "m", "--gpus", "3x", "--format", "json"]) == 1
        out, err = capsys.readouterr()
        assert json.loads(out)["verdict"] == "does not fit"
        assert err == ""

    def test_quiet(self, engine: list[Request], capsys: Any) -> None:
        assert app.run(["check", "m", "--gpus", "3x", "--format", "quiet"]) == 1
        assert capsys.readouterr() == ("does not fit\n", "")

    def test_a_reader_that_goes_away_is_no_error(self, tmp_path: Path) -> None:
        script = (
            "import sys; from plans import founding_plan; from memplan.cli.output import Output\n"
            "out = Output(); [out.plan(founding_plan()) for _ in range(200)]; sys.exit(1)"
        )
        errors = tmp_path / "errors"
        line = f'"$0" -c "$1" 2>{errors} | head -1; echo "${{PIPESTATUS[0]}}"'
        path = f"{ROOT}:{ROOT / 'tests'}"
        process = subprocess.run(
            ["bash", "-c", line, sys.executable, script],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert process.stdout.splitlines()[-1] == "1"
        assert "Traceback" not in errors.read_text()

    @pytest.mark.parametrize("environ", [{"LANG": "C"}, {"TERM": "dumb"}, {"LC_ALL": "POSIX"}])
    def test_ascii(self, environ: dict[str, str]) -> None:
        process = self._rendered(**environ)
        assert process.stdout.isascii()
        assert process.stdout.startswith("+- llama-2-13b ---")

    def test_width(self) -> None:
        assert max(map(len, self._rendered(COLUMNS="60").stdout.splitlines())) == 60
        assert max(map(len, self._rendered().stdout.splitlines())) == 80

    def test_colour(self) -> None:
        assert "\x1b" not in self._rendered().stdout
        assert "\x1b[31m" in self._rendered(FORCE_COLOR="1").stdout
        assert "\x1b" not in self._rendered(FORCE_COLOR="1", NO_COLOR="1").stdout

    @staticmethod
    def _rendered(**environ: str) -> subprocess.CompletedProcess[str]:
        script = (
            "from plans import founding_plan; from memplan.cli.output import Output\n"
            "Output().plan(founding_plan())"
        )
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "COLUMNS", "NO_COLOR"))
        }
        path = f"{ROOT}:{ROOT / 'tests'}"
        return subprocess.run(
            [sys.executable, "-c", script],
            env=kept | {"LANG": "en_US.UTF-8", "PYTHONUTF8": "1", "PYTHONPATH": path} | environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )


class TestHelp:
    def test_the_page_is_the_command_s_own(self) -> None:
        """`python -m memplan.cli.docs` writes it anew."""
        assert docs.DOCUMENT.read_text(encoding="utf-8") == docs.document()

    def test_help_is_instant_and_imports_nothing_heavy(self) -> None:
        script = (
            "import sys; from memplan.cli.app import run; run(['--help']); run(['check', '--help'])\n"
            "heavy = {'torch', 'rich', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            timeout=60,
        )
        best = min(self._seconds() for _ in range(5))
        assert best < 0.2

    @staticmethod
    def _seconds() -> float:
        start = time.perf_counter()
        assert memplan_process("--help").returncode == 0
        return time.perf_counter() - start

    def test_version(self) -> None:
        assert memplan_process("--version").stdout == f"memplan {memplan.__version__}\n"


def test_ctrl_c_while_starting_leaves_no_traceback(tmp_path: Path) -> None:
    script = (
        "import sys, time, types, memplan.plan\n"
        "def check(request, **options):\n"
        "    print('ready', file=sys.stderr, flush=True); time.sleep(30)\n"
        "memplan.plan.check = check\n"
        "cards = types.ModuleType('memplan.gpus.parse')\n"
        "from memplan.request import CardSpec\n"
        "cards.parse_cards = lambda text: (CardSpec(name='x', total_bytes=1),)\n"
        "sys.modules['memplan.gpus.parse'] = cards\n"
        "sys.argv = ['memplan', 'check', 'm', '--gpus', 'x']\n"
        "from memplan.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stderr.read().strip() == ""
    process.stderr.close()
