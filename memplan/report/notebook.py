"""A plan in a notebook: the same report as HTML. Everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from memplan.estimate import Estimate, Plan, RankEstimate
from memplan.report import words
from memplan.report.text import clean_line

_VERDICTS = {"fits": "#1a7f37", "tight": "#9a6700", "does not fit": "#cf222e", "unknown": "#8250df"}
_COLORS = {
    "parameters": "#0969da", "adapters": "#54aeff", "buffers": "#218bff", "gradients": "#8250df",
    "optimizer_state": "#1b7c83", "activations": "#2da44e", "temporaries": "#bf8700",
    "logits_and_loss": "#eac54f", "inputs": "#afb8c1", "workspaces": "#c297ff", "communication": "#3192aa",
    "allocator_cache": "#8c959f", "cuda_context": "#6e7781", "others": "#57606a", "missing": "#cf222e",
}  # fmt: skip
_FREE = "rgba(128,128,128,0.15)"


def plan_to_html(plan: Plan) -> str:
    """The report as one `<div>` with its own styles and no script."""
    color = _VERDICTS[plan.verdict]
    body = [
        f'<div style="border-left:4px solid {color};padding:0.2em 1em;margin-bottom:1em">',
        f'<div style="opacity:0.7">{_text(words.model_name(plan.request))}</div>',
        f'<b style="color:{color};font-size:1.2em">{_text(plan.verdict.capitalize())}</b>',
        f"<div>{_text(words.sentence(plan.reason))}</div>",
        f"<div>{_text(words.failure_sentence(plan.failure))}</div>" if plan.failure else "",
        "</div>",
    ]
    if plan.estimate is not None:
        body += _estimate(plan.estimate)
    body += _assumed(plan)
    for alternative in plan.alternatives:
        change, color = words.change_text(alternative.change), _VERDICTS[alternative.verdict]
        verdict = f'<b style="color:{color}">{_text(alternative.verdict)}</b>'
        body.append(f"<details open><summary>The same with <code>{_text(change)}</code>: {verdict}</summary>")
        body.append(f"<div>{_text(words.sentence(alternative.reason))}</div>")
        body += [*_estimate(alternative.estimate, with_phases=False), "</details>"]
    remarks = (*plan.hints, *(plan.estimate.notes if plan.estimate else ()))
    if remarks:
        body.append(f"<ul>{''.join(f'<li>{_text(remark)}</li>' for remark in remarks)}</ul>")
    body.append(f'<div style="opacity:0.7">{_text(words.footer(plan))}</div>')
    return f'<div style="max-width:50em">{"".join(body)}</div>'


def _estimate(estimate: Estimate, *, with_phases: bool = True) -> Iterator[str]:
    for card in words.cards(estimate):
        yield f"<p><b>{_text(words.card_title(card))}</b><br>{_text(words.card_use(card))}</p>"
        yield _bar(card)
        total = card.rank.total_bytes
        yield _table(
            ("", "size", "of the card"),
            (
                (part.label, words.size_text(part.size_bytes), _share(part.size_bytes, total))
                for part in words.parts(card)
            ),
            colors=[_COLORS.get(part.key, _FREE) for part in words.parts(card)],
        )
        yield f"<p>{_text(words.peak_sentence(card.rank))}</p>"
        if with_phases:
            yield _phases(card.rank)


def _bar(card: words.Card) -> str:
    parts = [part for part in words.parts(card) if part.size_bytes and part.key != "missing"]
    scale = sum(part.size_bytes or 0 for part in parts) or 1
    segments = "".join(
        f'<div title="{_text(part.label)}" style="width:{(part.size_bytes or 0) / scale:.3%};'
        f'background:{_COLORS.get(part.key, _FREE)}"></div>'
        for part in parts
    )
    return f'<div style="display:flex;height:1.2em;border:1px solid {_FREE}">{segments}</div>'


def _phases(rank: RankEstimate) -> str:
    rows = (
        (name.replace("_", " "), words.size_text(use.allocated_bytes), words.size_text(use.reserved_bytes))
        for name, use in rank.phases.items()
    )
    return _table(("phase", "allocated", "reserved"), rows)


def _assumed(plan: Plan) -> Iterator[str]:
    groups = words.assumed(plan.origins or plan.request.origins)
    if not groups:
        return
    yield "<details><summary>Assumed, since nobody chose</summary><ul>"
    for where, fields in groups:
        named = ", ".join(f"{_text(name)} <b>{_text(value)}</b>" for name, value in fields)
        yield f"<li>{named}: {_text(where)}</li>"
    yield "</ul></details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], colors: Sequence[str] = ()) -> str:
    def cells(tag: str, values: Sequence[str], color: str = "") -> str:
        mark = f'<span style="color:{color}">■</span> ' if color else ""
        first = f'<{tag} style="text-align:left">{mark}{_text(values[0])}</{tag}>'
        figures = (f'<{tag} style="text-align:right">{_text(value)}</{tag}>' for value in values[1:])
        return f"<tr>{first}{''.join(figures)}</tr>"

    lines = [cells("td", row, colors[index] if colors else "") for index, row in enumerate(rows)]
    return f"<table><thead>{cells('th', head)}</thead><tbody>{''.join(lines)}</tbody></table>"


def _share(size_bytes: int | None, total_bytes: int | None) -> str:
    return f"{size_bytes / total_bytes:.1%}" if size_bytes is not None and total_bytes else words.UNKNOWN


def _text(text: str) -> str:
    return escape(clean_line(text), quote=True)
