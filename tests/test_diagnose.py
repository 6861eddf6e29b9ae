"""What `diagnose` reads from texts: facts, phases, causes, events, and that no text can hurt it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import oom_texts as texts
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memplan
from memplan.diagnosis import compat, wordings
from memplan.diagnosis.parse import diagnose
from memplan.diagnosis.scan import WHOLE, read_rows
from memplan.diagnosis.types import Event
from memplan.report.diagnosis import headline, render_diagnosis
from memplan.units import GIB, MIB

ROOT = Path(__file__).parents[1]


def first(text: str) -> Event:
    return diagnose(text).events[0]


def sizes(text: str) -> dict[str, Any]:
    event = diagnose(text).to_dict()["events"][0]
    return {name: event[name] for name in event if name.endswith("_bytes") and event[name] is not None}


class TestFigures:
    def test_current_wording(self) -> None:
        assert sizes(texts.CURRENT) == {
            "requested_bytes": 2 * MIB,
            "total_bytes": round(23.64 * GIB),
            "free_bytes": round(1.5 * MIB),
            "allocated_bytes": round(23.08 * GIB),
            "reserved_unallocated_bytes": round(40.96 * MIB),
            "process_bytes": round(23.5 * GIB),
        }
        assert first(texts.CURRENT).figures.gpu == 2

    def test_older_wordings(self) -> None:
        old, oldest = first(texts.OLD).figures, first(texts.OLDEST).figures
        assert (old.gpu, old.reserved_bytes, old.reserved_unallocated_bytes) == (1, round(14.6 * GIB), None)
        assert (oldest.reserved_bytes, oldest.reserved_unallocated_bytes) == (None, round(120.25 * MIB))

    def test_the_own_process_is_told_by_arithmetic(self) -> None:
        """In a container the message counts this process among the numbered ones."""
        assert first(texts.FRAGMENTED).figures.process_bytes == round(31.2 * GIB)
        assert first(texts.FRAGMENTED).figures.other_process_bytes is None
        assert first(texts.SHARED).figures.other_process_bytes == 30 * GIB

    def test_async_allocator(self) -> None:
        assert sizes(texts.ASYNC) == {
            "requested_bytes": 256 * MIB,
            "total_bytes": round(79.18 * GIB),
            "free_bytes": round(76.81 * GIB),
            "allocated_bytes": round(1.75 * GIB),
        }

    def test_an_overflow_is_no_figure(self) -> None:
        text = texts.CURRENT.replace("23.50 GiB memory", "17179869184.00 GiB memory")
        assert first(text).figures.process_bytes is None

    @pytest.mark.parametrize(
        ("name", "stated"),
        [
            (
                "mps",
                {
                    "requested_bytes": 512 * MIB,
                    "total_bytes": round(18.13 * GIB),
                    "allocated_bytes": 17 * GIB,
                },
            ),
            ("cupy", {"requested_bytes": 2 * GIB, "allocated_bytes": GIB}),
            ("ggml", {"requested_bytes": 590 * MIB}),
            ("jax", {"requested_bytes": 2 * GIB}),
            ("tensorflow", {"requested_bytes": 4 * MIB}),
            ("paddle", {"requested_bytes": 3 * GIB // 2, "free_bytes": GIB, "allocated_bytes": 10 * GIB}),
            ("onnxruntime", {"requested_bytes": 4096}),
            ("vllm", {"requested_bytes": round(21.6 * GIB), "total_bytes": 24 * GIB, "free_bytes": 10 * GIB}),
            ("vllm length", {"requested_bytes": 4 * GIB, "free_bytes": 3 * GIB // 2}),
            ("cpu allocator", {"requested_bytes": 65536000}),
            ("numpy", {"requested_bytes": 8 * GIB}),
            ("kernel", {"process_bytes": GIB}),
            ("driver", {}),
            ("corrupt size", {}),
        ],
    )
    def test_of_other_frameworks(self, name: str, stated: dict[str, int]) -> None:
        assert sizes(texts.ONE_OF_EACH[name][1]) == stated


class TestKinds:
    @pytest.mark.parametrize("name", texts.ONE_OF_EACH)
    def test_each_kind(self, name: str) -> None:
        kind, text = texts.ONE_OF_EACH[name]
        diagnosis = diagnose(f"step 7\n{text}\n")
        assert [event.kind for event in diagnosis.events] == [kind]
        assert diagnosis.n_ooms == (kind not in ("not_oom", "load_dispatch"))
        assert diagnosis.events[0].line == (3 if name == "kubernetes" else 2) or name == "kubernetes"

    @pytest.mark.parametrize(
        "text", ["", "\n", "loss 0.1", "memory is fine", "Saved 12 files", "the oomph of it"]
    )
    def test_nothing(self, text: str) -> None:
        assert not diagnose(text).recognised

    def test_known_conflict(self) -> None:
        text = "TypeError: Trainer.__init__() got an unexpected keyword argument 'tokenizer'"
        diagnosis = diagnose(text)
        assert (diagnosis.events[0].kind, diagnosis.events[0].cause, diagnosis.n_ooms) == (
            "compat",
            "config",
            0,
        )
        assert [match.id for match in diagnosis.compat] == ["trainer-tokenizer"]

    def test_the_seeds_two(self) -> None:
        both = (
            "ValueError: You can't pass `load_in_4bit`or `load_in_8bit` as a kwarg when passing "
            "`quantization_config` argument at the same time.\n"
            "RuntimeError: \"triu_tril_cuda_template\" not implemented for 'BFloat16'\n"
        )
        ids = {match.id for match in diagnose(both).compat}
        assert ids == {"quantization-config-and-shortcut", "triu-tril-bfloat16"}


FRAMES = {
    "load": [
        ("transformers/modeling_utils.py", "from_pretrained"),
        ("torch/nn/modules/module.py", "_apply"),
    ],
    "forward": [("app/train.py", "main"), ("torch/nn/functional.py", "linear")],
    "loss": [("transformers/trainer.py", "train"), ("torch/nn/functional.py", "cross_entropy")],
    "backward": [("transformers/trainer.py", "training_step"), ("torch/_tensor.py", "backward")],
    "optimizer": [("transformers/trainer.py", "train"), ("torch/optim/adamw.py", "_init_group")],
    "eval": [("transformers/trainer.py", "prediction_step"), ("torch/nn/functional.py", "linear")],
    "generate": [("transformers/generation/utils.py", "generate"), ("torch/nn/functional.py", "linear")],
    "save": [("app/train.py", "save_checkpoint"), ("torch/_tensor.py", "float")],
    "data": [("app/train.py", "main"), ("accelerate/utils/operations.py", "send_to_device")],
}


class TestPhases:
    @pytest.mark.parametrize("phase", FRAMES)
    def test_from_frames(self, phase: str) -> None:
        frames = "".join(
            f'  File "/venv/site-packages/{path}", line 3, in {name}\n' for path, name in FRAMES[phase]
        )
        assert first(f"Traceback (most recent call last):\n{frames}{texts.OLD}").phase == phase

    def test_recomputation_is_backward(self) -> None:
        frames = (
            '  File "/v/site-packages/torch/_tensor.py", line 3, in backward\n'
            '  File "/v/site-packages/torch/utils/checkpoint.py", line 3, in unpack_hook\n'
            '  File "/v/site-packages/transformers/models/llama/modeling_llama.py", line 3, in forward\n'
        )
        assert first(f"Traceback (most recent call last):\n{frames}{texts.OLD}").phase == "backward"

    def test_an_argument_is_not_the_call(self) -> None:
        frames = (
            '  File "/app/train.py", line 3, in main\n'
            "    loss_of(model(x)).backward()\n"
            '  File "/v/site-packages/transformers/models/llama/modeling_llama.py", line 3, in forward\n'
        )
        assert first(f"Traceback (most recent call last):\n{frames}{texts.OLD}").phase == "forward"

    def test_ipython(self) -> None:
        text = (
            f"Cell In[3], line 1\n----> 1 model.to('cuda')\n\nFile "
            f"~/x/torch/nn/modules/module.py:9, in Module._apply(self)\n{texts.OLD}"
        )
        assert first(text).phase == "load"

    def test_unknown(self) -> None:
        assert first(texts.CURRENT).phase == "unknown"


class TestCauses:
    @pytest.mark.parametrize(
        ("text", "cause"),
        [
            (texts.CURRENT, "capacity"),
            (texts.OLD, "capacity"),
            (texts.CAPPED, "config"),
            (texts.FRAGMENTED, "fragmentation"),
            (texts.SHARED, "other_process"),
            (texts.CURRENT.replace("2.00 MiB", "20.00 GiB"), "single_huge_allocation"),
            (texts.CURRENT.replace("1.50 MiB is free", "9.00 GiB is free"), "unknown"),
            ("CUDA out of memory", "unknown"),
            ("Tried to allocate more than 1EB memory.", "config"),
            (texts.ONE_OF_EACH["kernel"][1], "host_ram"),
            (texts.ONE_OF_EACH["vllm"][1], "other_process"),
            (texts.ONE_OF_EACH["vllm length"][1], "kv_cache"),
        ],
    )
    def test_cause(self, text: str, cause: str) -> None:
        event = first(text)
        assert event.cause == cause
        assert event.evidence or event.kind == "host_oom"

    def test_unknown_asks_for_what_would_tell(self) -> None:
        assert "nvidia-smi" in first("CUDA out of memory").advice[0].text

    def test_advice_in_vain_is_said_to_be(self) -> None:
        in_vain = [advice.text for advice in first(texts.LOADING).advice if not advice.helps]
        assert in_vain == [
            "not a smaller batch: no batch has been made yet",
            "not more cards by themselves: each process of a data-parallel job loads the whole model",
        ]
        shared = [a.text for a in first(texts.SHARED + " set expandable_segments:True").advice if not a.helps]
        assert shared == [
            (
                "not `expandable_segments`, which the message suggests: only 20.0 MiB are cached, less "
                "than was asked for"
            )
        ]

    def test_fixes_are_in_the_tools_own_words(self) -> None:
        axolotl = texts.LOADING.replace("/srv/job/train.py", "/srv/axolotl/cli/train.py")
        assert "`load_in_4bit: true` and `adapter: qlora`" in first(axolotl).advice[0].text
        assert "BitsAndBytesConfig" in first(texts.LOADING).advice[0].text


class TestEvents:
    def test_ranks_are_put_apart(self) -> None:
        rows = [
            '[rank0]:   File "/v/torch/optim/adamw.py", line 1, in step',
            '[rank1]:   File "/v/torch/_tensor.py", line 1, in backward',
            f"[rank0]: {texts.OLD}",
            f"[rank1]: {texts.OLD.replace('33.00', '11.00')}",
        ]
        diagnosis = diagnose("\n".join(rows))
        assert [(e.rank, e.phase, e.line) for e in diagnosis.events] == [
            (0, "optimizer", 3),
            (1, "backward", 4),
        ]

    def test_the_same_failure_told_twice_is_one(self) -> None:
        diagnosis = diagnose(
            f"{texts.CURRENT}\n\nDuring handling of the above exception\n\n{texts.CURRENT}\n"
        )
        assert (diagnosis.n_ooms, diagnosis.events[0].echoes) == (1, 1)

    def test_what_follows_is_an_echo(self) -> None:
        diagnosis = diagnose(f"{texts.CURRENT}\nfailed (exitcode: -9) local_rank: 1 (pid: 9)\n")
        assert [event.kind for event in diagnosis.events] == ["cuda_oom"]

    @pytest.mark.parametrize(
        "around",
        [
            "{}",
            "> {}",
            "```\n{}\n```",
            "\x1b[31m{}\x1b[0m",
            "^[[31m{}^[[0m",
            "│ {} │",
            "**{}**",
            "训练时报错：{} 怎么办",
            "2026-01-01T00:00:00Z {}\r\n",
            "(RayTrainWorker pid=9, ip=1.2.3.4) {}",
        ],
    )
    def test_whatever_is_around_it(self, around: str) -> None:
        assert sizes(around.format(texts.CURRENT)) == sizes(texts.CURRENT)

    @pytest.mark.parametrize("prefix", ["", "> ", "# ", "    ", "/// "])
    def test_wrapped(self, prefix: str) -> None:
        import textwrap

        wrapped = textwrap.fill(texts.CURRENT, 60, initial_indent=prefix, subsequent_indent=prefix)
        assert sizes(wrapped) == sizes(texts.CURRENT)

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_line_ends(self, end: str) -> None:
        assert first(end.join(["one", "two", texts.CURRENT, ""])).line == 3

    def test_utf_16(self, tmp_path: Path) -> None:
        path = tmp_path / "powershell.log"
        path.write_text(texts.CURRENT, encoding="utf-16")
        with path.open("rb") as stream:
            rows, _ = read_rows(stream)
        assert sizes(rows[0][1]) == sizes(texts.CURRENT)


def test_the_answer_word_by_word() -> None:
    assert render_diagnosis(diagnose(texts.LOADING)) == (
        "GPU 2 ran out of memory while loading or placing the model: 2.0 MiB were asked\n"
        "for, 23.08 GiB of 23.64 GiB were already held by this process and 1.5 MiB were\n"
        "free.\n"
        "What it needs is more than the card has.\n"
        "\n"
        "Evidence\n"
        "  - this process itself holds 23.50 GiB of 23.64 GiB\n"
        "  - not fragmentation: 41.0 MiB were cached and unused\n"
        "  - phase: from_pretrained in modeling_utils.py\n"
        "  - line 6 of the text, from transformers\n"
        "\n"
        "What to change\n"
        "  1. fewer bits a weight:\n"
        "     `quantization_config=BitsAndBytesConfig(load_in_4bit=True)`\n"
        "  2. over several cards: FSDP (`--fsdp full_shard`) or ZeRO-3 (`--deepspeed\n"
        "     ds_zero3.json`), which divide the weights over the cards\n"
        "\n"
        "What won't help\n"
        "  - not a smaller batch: no batch has been made yet\n"
        "  - not more cards by themselves: each process of a data-parallel job loads the\n"
        "    whole model"
    )


def test_headlines() -> None:
    assert headline(first(texts.ONE_OF_EACH["driver"][1])) == "The CUDA driver ran out of memory"
    assert headline(first("[rank3]: CUDA out of memory")) == "A GPU (rank 3) ran out of memory"
    assert headline(first(texts.ONE_OF_EACH["assert"][1])) == "This is no lack of GPU memory"


def test_the_package_is_the_function() -> None:
    assert memplan.diagnose(texts.CURRENT).n_ooms == 1


def test_keys_of_the_json() -> None:
    document = diagnose(texts.CURRENT).to_dict()
    assert list(document) == ["events", "compat", "n_ooms"]
    assert list(document["events"][0]) == [
        "kind",
        "framework",
        "gpu",
        "rank",
        "requested_bytes",
        "total_bytes",
        "free_bytes",
        "allocated_bytes",
        "reserved_bytes",
        "reserved_unallocated_bytes",
        "process_bytes",
        "other_process_bytes",
        "phase",
        "cause",
        "evidence",
        "fixes",
        "line",
    ]


class TestData:
    def test_wordings_hold_their_needles(self) -> None:
        for wording in wordings.wordings():
            assert wording.source
            assert wording.needle == wording.needle.lower()
            wordings.compiled(wording.pattern)
            assert not any(twice in wording.pattern for twice in (")+", ")*", ".*", ".+")), wording.pattern

    def test_compat(self) -> None:
        entries = compat.entries()
        assert len({entry.id for entry in entries}) == len(entries) == 71
        for entry in entries:
            assert entry.title and entry.cause and entry.fix and entry.versions
            assert entry.source.startswith("https://")
            wordings.compiled(entry.pattern)
            for spec in entry.affected.values():
                assert compat.satisfies("0.0.1", spec) or compat.satisfies("99.0", spec) or "," in spec

    @pytest.mark.parametrize(
        ("version", "specifier", "holds"),
        [
            ("4.41.2", ">=4.41,<5", True),
            ("5.0.0", ">=4.41,<5", False),
            ("2.1.0+cu121", "<2.1", False),
            ("2.0.1", "<2.1", True),
            ("2.1", ">=2.1.0", True),
            ("unknown", "<2.1", False),
        ],
    )
    def test_versions(self, version: str, specifier: str, holds: bool) -> None:
        assert compat.satisfies(version, specifier) is holds


PIECES = [
    *(text for _, text in texts.ONE_OF_EACH.values()),
    texts.CURRENT,
    texts.OLD,
    texts.ASYNC,
    "\x1b[31m",
    "\x1b]0;title\x07",
    "[bold]x[/bold]",
    "[rank1]: ",
    "\r",
    "\n",
    "Traceback (most recent call last):\n",
    '  File "a.py", line 1, in f\n',
    "> ",
    "```",
    "\u202e",
    "1",
    " GiB ",
    "Process 1 has ",
    "shape[1,",
    "\\n",
    "=\n",
    "0: ",
    "( ",
    "|",
]

REPEATED = [
    "\n",
    "[rank1]: x\n",
    texts.CURRENT,
    texts.OLD + "\n",
    "Process 1 has 1 GiB memory in use ",
    "shape[1,",
    "\x1b]0;",
    '  File "a", line 1, in f\n',
    "CUDA out of memory ",
    "Traceback (most recent call last):\n",
]


class TestHostileTexts:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=30)), max_size=30).map("".join))
    def test_no_text_breaks_it_or_steers_the_terminal(self, text: str) -> None:
        diagnosis = diagnose(text)
        shown = render_diagnosis(diagnosis)
        assert not any(c in shown for c in "\x1b\x9b\x07\r\u202e")
        assert diagnosis.n_ooms <= len(diagnosis.events) or len(diagnosis.events) == 200
        for event in diagnosis.events:
            assert event.line >= 1
        diagnosis.to_dict()

    @pytest.mark.parametrize("piece", REPEATED)
    def test_time_grows_with_the_text_and_no_faster(self, piece: str) -> None:
        def seconds(size: int) -> float:
            text = (piece * (size // len(piece) + 1))[:size]
            best = 9.0
            for _ in range(3):
                started = time.process_time()
                diagnose(text)
                best = min(best, time.process_time() - started)
            return best

        # four times the text: a quadratic reading would take sixteen times as long
        assert seconds(200_000) < 9 * seconds(50_000) + 0.05


class TestStreaming:
    def test_events_of_a_long_log_keep_their_lines(self, tmp_path: Path) -> None:
        filler = "INFO step 12345 loss 1.2345 gpu memory 61.2GB\n"
        log = tmp_path / "run.log"
        with log.open("w") as file:
            for part, text in enumerate((texts.OLD, texts.CURRENT, texts.FRAGMENTED)):
                file.write(filler * 30_000)
                file.write(f"{text}\n")
                assert part < 3
            file.write(filler * 30_000)
        assert log.stat().st_size > 2 * WHOLE
        with log.open("rb") as stream:
            rows, count = read_rows(stream)
        from memplan.diagnosis.parse import diagnose_rows

        diagnosis = diagnose_rows(rows, count)
        assert [event.line for event in diagnosis.events] == [30_001, 60_002, 90_003]
        assert [event.figures.gpu for event in diagnosis.events] == [1, 2, 0]

    def test_memory_is_bounded(self, tmp_path: Path) -> None:
        log = tmp_path / "big.log"
        block = b"INFO step 12345 loss 1.2345 gpu memory 61.2GB tokens 12345\n" * 20_000
        with log.open("wb") as file:
            for _ in range(160):
                file.write(block)
            file.write(texts.CURRENT.encode())
        script = (
            "import sys; from memplan.cli.app import run; code = run(['diagnose', sys.argv[1]])\n"
            "peak = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
            "print(*peak, file=sys.stderr); sys.exit(code)"
        )
        process = subprocess.run(
            [sys.executable, "-c", script, str(log)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        assert "GPU 2" in process.stdout
        assert int(process.stderr) * 1024 < 200 * MIB
