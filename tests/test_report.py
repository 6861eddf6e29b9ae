"""What a person and a program read: the words, the widths, and nothing that steers a terminal or a page."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import alternative, estimate, founding_plan, founding_request, rank
from rich.cells import cell_len

from memplan.errors import MemplanError
from memplan.estimate import Plan
from memplan.report import words
from memplan.report.error import render_error, render_remark
from memplan.report.json import plan_to_dict
from memplan.report.terminal import render_plan
from memplan.report.text import clean, clean_line, is_plain, to_ascii, wants_color
from memplan.request import Origin
from memplan.units import GIB, MIB

EXPECTED = Path(__file__).parent / "expected"
SCHEMA = json.loads((Path(words.__file__).parent / "plan.schema.json").read_text(encoding="utf-8"))
HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x1b[0m[bold]b[/bold]<script>alert(1)</script>\u202e&\"'\r\n"


def unknown_plan() -> Plan:
    return founding_plan(
        verdict="unknown", reason="the model's code can't run on the meta device", estimate=None,
        failure=None, alternatives=(),
    )  # fmt: skip


def hostile_plan() -> Plan:
    request = replace(founding_request(), model=HOSTILE)
    origins = {HOSTILE: Origin(value=[HOSTILE], stated=False, where=HOSTILE)}
    changes: dict[str, Any] = {
        "device": HOSTILE, "peak_operator": HOSTILE, "peak_module": HOSTILE, "peak_phase": HOSTILE,
        "phases": {HOSTILE: rank().train}, "breakdown_bytes": {HOSTILE: 1},
    }  # fmt: skip
    shown = estimate(request, rank(**changes), notes=(HOSTILE,))
    return founding_plan(
        request=request, reason=HOSTILE, estimate=shown, origins=origins, versions={HOSTILE: HOSTILE},
        hints=(HOSTILE,), alternatives=(replace(alternative(), change={HOSTILE: HOSTILE}, reason=HOSTILE),),
    )  # fmt: skip


class TestTerminal:
    @pytest.mark.parametrize(
        ("name", "options"),
        [("plan-80.txt", {"width": 80}), ("plan-60-ascii.txt", {"width": 60, "plain": True})],
    )
    def test_the_founding_case_word_by_word(self, name: str, options: dict[str, Any]) -> None:
        """Write tests/expected anew with `python tests/test_report.py` and read the difference."""
        assert render_plan(founding_plan(), **options) + "\n" == (EXPECTED / name).read_text(encoding="utf-8")

    @pytest.mark.parametrize("plan", [founding_plan(), unknown_plan(), hostile_plan()])
    @pytest.mark.parametrize("width", [40, 60, 80, 100])
    @pytest.mark.parametrize("plain", [False, True])
    def test_no_line_is_wider_than_the_terminal(self, plan: Plan, width: int, plain: bool) -> None:
        text = render_plan(plan, width=width, plain=plain)
        assert max(map(cell_len, text.splitlines())) <= width

    def test_plain_is_ascii_with_the_same_layout(self) -> None:
        rich, plain = (render_plan(founding_plan(), plain=plain) for plain in (False, True))
        assert plain.isascii()
        assert list(map(len, rich.splitlines())) == list(map(len, plain.splitlines()))
        assert "?" not in plain

    def test_colour_adds_nothing_but_colour(self) -> None:
        plan = founding_plan()
        coloured = re.sub(r"\x1b\[[0-9;]*m", "", render_plan(plan, color=True))
        assert [line.rstrip() for line in coloured.splitlines()] == render_plan(plan).splitlines()
        assert "\x1b" not in render_plan(plan)

    def test_the_verdict_comes_first(self) -> None:
        lines = render_plan(founding_plan()).splitlines()
        assert lines[1].strip("│ ") == "Does not fit"
        assert lines[2].strip("│ ").startswith("It fails while loading: each of the 3 processes")

    def test_equal_ranks_are_shown_once_and_others_apart(self) -> None:
        assert render_plan(founding_plan(alternatives=())).count("3 × 23.64GiB, ranks 0–2") == 1
        other = rank(1, peak_reserved_bytes=28 * GIB)
        plan = founding_plan(estimate=estimate(None, rank(0), other, rank(2), rank(3)), alternatives=())
        text = render_plan(plan)
        assert "3 × 23.64GiB, ranks 0, 2–3" in text
        assert "1 × 23.64GiB, rank 1" in text

    def test_what_is_not_known_is_unknown(self) -> None:
        unknown = rank(non_torch_bytes=None, total_bytes=None)
        text = render_plan(founding_plan(estimate=estimate(None, unknown), alternatives=(), failure=None))
        assert "27.03 GiB reserved + unknown context, of unknown" in text
        rows = {
            line.split("  ")[2]: line.split()[-2:] for line in text.splitlines() if line.startswith("  ░")
        }
        assert rows == {"free": ["unknown", "unknown"]}
        assert re.search(r"CUDA context +unknown +unknown", text)
        assert not re.search(r"\b0 B|0\.00 GiB", text)

    def test_other_processes_take_their_share(self) -> None:
        request = founding_request()
        request = replace(request, cards=(replace(request.cards[0], used_bytes=2 * GIB),))
        text = render_plan(founding_plan(estimate=estimate(request, rank()), alternatives=()), width=100)
        assert "+ 2.00 GiB of other processes, of 23.64 GiB" in text
        assert re.search(r"other processes +2\.00 GiB", text)
        assert re.search(r"missing +6\.14 GiB", text)

    def test_an_unknown_verdict_has_no_figures(self) -> None:
        text = render_plan(unknown_plan())
        assert "Unknown" in text
        assert "reserved" not in text

    def test_nothing_from_outside_steers_the_terminal(self) -> None:
        text = render_plan(hostile_plan())
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
        assert "owned" not in text
        assert "red[bold]b[/bold]<script>" in text

    def test_notes_say_what_is_less_certain(self) -> None:
        plan = founding_plan(estimate=estimate(None, notes=("torch 2.14 has not been measured",)))
        assert "What makes this less certain\n  torch 2.14 has not been measured" in render_plan(plan)


class TestJson:
    @pytest.mark.parametrize(
        "plan", [founding_plan(), unknown_plan(), hostile_plan(), founding_plan(cached=True)]
    )
    def test_a_plan_holds_to_the_schema(self, plan: Plan) -> None:
        document = json.loads(json.dumps(plan_to_dict(plan), allow_nan=False))
        jsonschema.Draft202012Validator(SCHEMA).validate(document)
        assert document == plan_to_dict(plan)

    def test_unknown_sizes_are_null(self) -> None:
        plan = founding_plan(estimate=estimate(None, rank(non_torch_bytes=None, total_bytes=None)))
        document = plan_to_dict(plan)
        jsonschema.Draft202012Validator(SCHEMA).validate(document)
        assert document["ranks"][0]["non_torch_bytes"] is None

    def test_an_error_holds_to_the_schema(self) -> None:
        jsonschema.Draft202012Validator(SCHEMA).validate({"error": MemplanError("no-gpu", "none").to_dict()})

    def test_the_schema_is_one_and_describes_every_field(self) -> None:
        jsonschema.Draft202012Validator.check_schema(SCHEMA)
        for name, definition in SCHEMA["$defs"].items():
            assert "description" in definition, name
            for field, described in definition.get("properties", {}).items():
                assert "description" in described or "$ref" in described, (name, field)

    def test_nothing_is_left_out_or_added(self) -> None:
        document = plan_to_dict(founding_plan())
        document["extra"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(SCHEMA).validate(document)
        del document["extra"], document["cached"]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(SCHEMA).validate(document)

    def test_ranks_are_all_there(self) -> None:
        assert [entry["rank"] for entry in plan_to_dict(founding_plan())["ranks"]] == [0, 1, 2]


class TestNotebook:
    def test_everything_is_escaped(self) -> None:
        html = hostile_plan()._repr_html_()
        assert "<script" not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;" in html
        assert not re.search(r"[\x00-\x1f\u202e]", html)

    def test_it_says_what_the_terminal_says(self) -> None:
        html = founding_plan()._repr_html_()
        for text in ("Does not fit", "It fails while loading", "3 × 23.64GiB, ranks 0–2", "logits and loss",
                     "--load_in_4bit", "follows --bf16", "9.47 GiB", "load the base in 4 bits"):  # fmt: skip
            assert text in html

    def test_tags_are_closed(self) -> None:
        html = founding_plan()._repr_html_()
        for tag in ("div", "table", "tr", "td", "details", "ul", "li", "span", "b", "p"):
            assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag

    def test_unknown(self) -> None:
        assert "Unknown" in unknown_plan()._repr_html_()


class TestError:
    FULL = MemplanError(
        "a-reference", "no `x` here", context="it matters\ntwice", hint="add `x`", note="your disk's fault"
    )

    def test_in_full(self) -> None:
        assert render_error(self.FULL) == (
            "error[a-reference]: no `x` here\n"
            "  why: it matters\n"
            "  why: twice\n"
            "  note: your disk's fault\n"
            "  hint: add `x`"
        )

    def test_alone(self) -> None:
        assert render_error(MemplanError("a-reference", "no `x` here")) == "error[a-reference]: no `x` here"

    def test_in_colour(self) -> None:
        assert render_error(self.FULL, color=True) == (
            "\x1b[1;31merror[a-reference]\x1b[0m: no `x` here\n"
            "  \x1b[2mwhy\x1b[0m: it matters\n"
            "  \x1b[2mwhy\x1b[0m: twice\n"
            "  \x1b[2mnote\x1b[0m: your disk's fault\n"
            "  \x1b[36mhint\x1b[0m: add `x`"
        )

    def test_in_ascii(self) -> None:
        assert render_error(MemplanError("a", "3 × é"), plain=True) == "error[a]: 3 x ?"

    def test_wrapped(self) -> None:
        error = MemplanError("a", "one two three four five six", hint="seven eight nine ten eleven twelve")
        assert render_error(error, width=24) == (
            "error[a]: one two three\n"
            "  four five six\n"
            "  hint: seven eight nine\n"
            "    ten eleven twelve"
        )  # fmt: skip

    def test_of_hostile_names(self) -> None:
        assert render_error(MemplanError("a", "\x1b[2Jno `\x1b]8;;http://x\x07m`")) == "error[a]: no `m`"

    def test_remark(self) -> None:
        assert render_remark("hint", "do\n this") == "hint: do this"
        assert render_remark("hint", "x", color=True) == "\x1b[36mhint\x1b[0m: x"


class _Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


class TestText:
    @given(st.text())
    @settings(max_examples=300)
    def test_clean_is_clean_and_stays_so(self, text: str) -> None:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", clean(text))
        assert clean(clean(text)) == clean(text)
        assert "\n" not in clean_line(text)

    @given(st.text())
    def test_ascii_keeps_the_length(self, text: str) -> None:
        assert len(to_ascii(text)) == len(text)
        assert to_ascii(text).isascii()

    @pytest.mark.parametrize(
        ("environ", "plain"),
        [
            ({}, False),
            ({"LANG": "C"}, True),
            ({"LANG": "en_US.UTF-8"}, False),
            ({"LC_ALL": "POSIX", "LANG": "en_US.UTF-8"}, True),
            ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, True),  # as Python sets it by itself, PEP 538
            ({"LANG": "C.UTF-8"}, False),
            ({"TERM": "dumb", "LANG": "en_US.UTF-8"}, True),
        ],
    )
    def test_plain_terminals(self, environ: dict[str, str], plain: bool) -> None:
        assert is_plain(_Terminal(), environ) is plain

    def test_an_encoding_other_than_utf_is_plain(self) -> None:
        assert is_plain(io.TextIOWrapper(io.BytesIO(), encoding="latin-1"), {})

    @pytest.mark.parametrize(
        ("environ", "color"),
        [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
    )
    def test_colour(self, environ: dict[str, str], color: bool) -> None:
        assert wants_color(_Terminal(), environ) is color
        assert wants_color(io.StringIO(), environ) is False


def test_every_category_has_a_name_and_a_colour() -> None:
    from memplan.report import notebook, terminal
    from memplan.timeline import Category

    names = {category.name.lower() for category in Category} | {"allocator_cache", "cuda_context"}
    assert names == set(words.CATEGORIES)
    assert names <= terminal._COLORS.keys()
    assert names <= notebook._COLORS.keys()


def test_sizes() -> None:
    assert [words.size_text(size) for size in (None, 0, 512, 2 * MIB, 100 * MIB, 24 * GIB)] == [
        "unknown", "0 B", "512 B", "2.0 MiB", "0.10 GiB", "24.00 GiB",
    ]  # fmt: skip


if __name__ == "__main__":
    EXPECTED.mkdir(exist_ok=True)
    (EXPECTED / "plan-80.txt").write_text(render_plan(founding_plan(), width=80) + "\n", encoding="utf-8")
    plain = render_plan(founding_plan(), width=60, plain=True)
    (EXPECTED / "plan-60-ascii.txt").write_text(plain + "\n", encoding="utf-8")
