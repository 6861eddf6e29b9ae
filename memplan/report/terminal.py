"""A plan for a terminal: the verdict first, then each card, the phases, what was assumed, and what else fits.

Everything is laid out in rich `Text`, never in its markup, so that no name can be taken for a style. The
characters used have one-for-one counterparts in ASCII, so a plain terminal gets the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from memplan.estimate import Estimate, Plan, RankEstimate
from memplan.report import words
from memplan.report.text import clean_line, to_ascii

_VERDICTS = {"fits": "green", "tight": "yellow", "does not fit": "red", "unknown": "magenta"}
_COLORS = {
    "parameters": "blue", "adapters": "bright_blue", "buffers": "blue", "gradients": "magenta",
    "optimizer_state": "cyan", "activations": "green", "temporaries": "yellow",
    "logits_and_loss": "bright_yellow", "inputs": "white", "workspaces": "bright_magenta",
    "communication": "bright_cyan", "allocator_cache": "bright_black", "cuda_context": "bright_black",
    "others": "bright_black", "missing": "red", "free": "default",
}  # fmt: skip
_GLYPHS = {"allocator_cache": "▒", "cuda_context": "▒", "others": "▒", "free": "░"}
_NARROWEST = 40
_INDENT = 2


def render_plan(plan: Plan, *, width: int = 80, color: bool = False, plain: bool = False) -> str:
    """The report's text, at most `width` columns wide."""
    stream = StringIO()
    console = Console(
        file=stream,
        width=max(width, _NARROWEST),
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        legacy_windows=False,
        _environ={},
    )
    console.print(Group(*_sections(plan, console.width)))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    text = "\n".join(lines).strip("\n")
    return to_ascii(text) if plain else text


def _sections(plan: Plan, width: int) -> Iterable[RenderableType]:
    yield _verdict(plan)
    if plan.estimate is not None:
        yield from _estimate(plan.estimate, width)
    yield from _assumed(plan)
    for alternative in plan.alternatives:
        title = f"The same with {words.change_text(alternative.change)}: {alternative.verdict}"
        yield _heading(title, _VERDICTS[alternative.verdict])
        yield _body(Text(words.sentence(alternative.reason)))
        yield from _estimate(alternative.estimate, width, with_phases=False)
    notes = plan.estimate.notes if plan.estimate else ()
    if notes:
        yield _heading("What makes this less certain")
        yield _body(Group(*(Text(clean_line(note)) for note in notes)))
    yield Text()
    yield Text(words.footer(plan), style="dim")


def _verdict(plan: Plan) -> RenderableType:
    color = _VERDICTS[plan.verdict]
    text = Text(plan.verdict.capitalize(), style=f"bold {color}")
    lines: list[RenderableType] = [text, Text(words.sentence(plan.reason))]
    if plan.failure is not None:
        lines.append(Text(words.failure_sentence(plan.failure), style="dim"))
    title = Text(words.model_name(plan.request), style="bold")
    return Panel(Group(*lines), title=title, title_align="left", border_style=color, box=box.ROUNDED)


def _estimate(estimate: Estimate, width: int, *, with_phases: bool = True) -> Iterable[RenderableType]:
    for card in words.cards(estimate):
        yield _heading(words.card_title(card))
        yield _body(Text(words.card_use(card)))
        yield _body(_bar(card, width - 2 * _INDENT))
        yield _body(_parts(card))
        yield Text()
        yield _body(Text(words.peak_sentence(card.rank)))
        if with_phases and card.rank.phases:
            yield Text()
            yield _body(_phases(card.rank))


def _bar(card: words.Card, width: int) -> Text:
    """The card drawn to scale; where more is needed than it has, a `│` marks where it ends."""
    parts = [part for part in words.parts(card) if part.size_bytes is not None and part.key != "missing"]
    scale = sum(part.size_bytes or 0 for part in parts)
    bar, drawn, upto = Text(), 0, 0
    for part in parts:
        upto += part.size_bytes or 0
        end = round(upto / scale * width) if scale else 0
        bar.append(_GLYPHS.get(part.key, "█") * (end - drawn), style=_COLORS.get(part.key, "default"))
        drawn = end
    total, free = card.rank.total_bytes, words.free_bytes(card)
    if total and free is not None and free < 0:
        at = min(round(total / scale * width), width - 1)
        return Text.assemble(bar[:at], ("│", "bold red"), bar[at + 1 :])
    return bar


def _parts(card: words.Card) -> Table:
    total = card.rank.total_bytes
    table = _table("", "", "size", "of the card")
    for part in words.parts(card):
        color = _COLORS.get(part.key, "default")
        is_last = part.key in ("free", "missing")
        share = f"{part.size_bytes / total:.1%}" if total and part.size_bytes is not None else words.UNKNOWN
        table.add_row(
            Text(_GLYPHS.get(part.key, "■"), style=color),
            Text(part.label, style="bold" if is_last else ""),
            words.size_text(part.size_bytes),
            share,
        )
    return table


def _phases(rank: RankEstimate) -> Table:
    table = _table("phase", "allocated", "reserved")
    for name, use in rank.phases.items():
        style = "bold" if name == rank.peak_phase else ""
        mark = " (peak)" if name == rank.peak_phase else ""
        table.add_row(
            Text(clean_line(name).replace("_", " ") + mark, style=style),
            Text(words.size_text(use.allocated_bytes), style=style),
            Text(words.size_text(use.reserved_bytes), style=style),
        )
    return table


def _assumed(plan: Plan) -> Iterable[RenderableType]:
    groups = words.assumed(plan.origins or plan.request.origins)
    if not groups:
        return
    yield _heading("Assumed, since nobody chose")
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column()
    lines.add_column(overflow="fold")
    for where, fields in groups:
        line = Text(", ").join(Text.assemble(f"{name} ", (value, "bold")) for name, value in fields)
        lines.add_row(Text("·"), line.append(f": {where}", style="dim"))
    yield _body(lines)


def _table(*columns: str) -> Table:
    """A table whose first columns are names and whose others, from `size` on, are figures."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    names = columns.index("size") if "size" in columns else 1
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < names else "right", overflow="fold")
    return table


def _heading(text: str, style: str = "") -> RenderableType:
    return Group(Text(), Text(text, style=f"bold {style}".strip()))


def _body(content: RenderableType) -> RenderableType:
    return Padding(content, (0, _INDENT))
