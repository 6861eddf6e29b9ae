"""A diagnosis as a person reads it: one sentence of what happened, then the evidence, then what to change."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from memplan.diagnosis.types import NOT_OOM, CompatMatch, Diagnosis, Event, Replan
from memplan.report.text import clean, clean_line, to_ascii
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.diagnosis.doctor import Health

_WHEN = {
    "load": " while loading or placing the model",
    "forward": " in the forward pass",
    "loss": " while computing the loss",
    "backward": " in the backward pass",
    "optimizer": " in the optimizer's step",
    "eval": " while evaluating",
    "generate": " while generating",
    "save": " while saving",
    "data": " while preparing a batch",
    "unknown": "",
}
_WHY = {
    "capacity": "What it needs is more than the card has",
    "fragmentation": "Enough was reserved, but in pieces that are too small",
    "other_process": "Something else holds the card",
    "single_huge_allocation": "One tensor asks for most of the card",
    "host_ram": "The host's memory ran out, not a GPU's",
    "kv_cache": "The KV cache has too little room",
    "config": "A setting is in the way, not the card",
    "leak": "Use grows from step to step",
    "unknown": "Why can't be told from this text",
}
_NO_OOM_WHY = {
    "load_dispatch": "The card had no room for all of the model",
    "not_oom": "No GPU memory is short here",
}
_NAMES = {
    "host_oom": "The host", "shm": "Shared memory", "mps_oom": "The Mac's GPU", "metal_oom": "The Mac's GPU",
    "vllm_kv": "vLLM's KV cache", "sglang_kv": "SGLang's memory pool", "nccl_oom": "NCCL",
    "cublas_alloc": "cuBLAS", "cudnn_alloc": "cuDNN", "cuda_error_oom": "The CUDA driver",
}  # fmt: skip
_INDENT = "  "
_SHOWN_EVENTS = 12


def render_diagnosis(
    diagnosis: Diagnosis, *, width: int = 80, color: bool = False, plain: bool = False
) -> str:
    """The report's text."""
    page = _Page(width, color)
    if not diagnosis.recognised:
        page.text("Nothing in this text is a failure that memplan knows", style="bold")
        page.item("hint", "Paste the whole output, from the start of the traceback to its last line")
    if diagnosis.events:
        _first(page, diagnosis.events[0])
    if diagnosis.replan is not None:
        _replan(page, diagnosis.replan)
    _others(page, diagnosis)
    _compat(page, diagnosis)
    return page.render(plain)


def headline(event: Event) -> str:
    """`GPU 2 ran out while loading the model: 2.0 MiB were asked for, 23.08 GiB of 23.64 GiB were …`."""
    if event.kind == "not_oom":
        return f"This is no lack of GPU memory{_WHEN[event.phase]}"
    if event.kind == "compat":
        return f"Nothing ran out: the versions or arguments don't go together{_WHEN[event.phase]}"
    if event.kind == "load_dispatch":
        return "The model did not fit the card while loading, and parts of it went to the CPU or disk"
    who = _NAMES.get(event.kind) or _gpu(event)
    if event.rank is not None:
        who += f" (rank {event.rank})"
    figures = _figures(event)
    return f"{who} ran out of memory{_WHEN[event.phase]}" + (f": {figures}" if figures else "")


def _gpu(event: Event) -> str:
    name = "NPU" if event.kind == "npu_oom" else "GPU"
    return f"A {name}" if event.figures.gpu is None else f"{name} {event.figures.gpu}"


def _figures(event: Event) -> str:
    f = event.figures
    parts = []
    if f.requested_bytes is not None:
        parts.append(f"{format_bytes(f.requested_bytes)} were asked for")
    held = f.allocated_bytes if f.allocated_bytes is not None else f.process_bytes
    if held is not None and f.total_bytes is not None:
        parts.append(
            f"{format_bytes(held)} of {format_bytes(f.total_bytes)} were already held by this process"
        )
    elif held is not None:
        parts.append(f"{format_bytes(held)} were already held")
    if f.free_bytes is not None:
        of = "" if held is not None or f.total_bytes is None else f" of {format_bytes(f.total_bytes)}"
        parts.append(f"{format_bytes(f.free_bytes)}{of} were free")
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


class _Page:
    """Lines of at most a width, styled where asked; whatever comes from outside is cleaned on its way in."""

    def __init__(self, width: int, color: bool) -> None:
        self.width, self.color, self.lines = max(width, 40), color, list[str]()

    def text(self, text: str, *, style: str = "", indent: str = "") -> None:
        wrapped = textwrap.wrap(
            clean_line(text),
            self.width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        self.lines += [self._styled(line, style) for line in wrapped]

    def heading(self, text: str) -> None:
        if self.lines:
            self.lines.append("")
        self.text(text, style="bold")

    def item(self, label: str, text: str) -> None:
        head = f"{_INDENT}{label} "
        wrapped = textwrap.wrap(
            clean_line(text),
            self.width,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_on_hyphens=False,
        )
        self.lines += wrapped or [head.rstrip()]

    def render(self, plain: bool) -> str:
        text = "\n".join(self.lines)
        return to_ascii(text) if plain else text

    def _styled(self, line: str, style: str) -> str:
        code = {"bold": "1", "red": "1;31", "dim": "2"}.get(style)
        return f"\x1b[{code}m{line}\x1b[0m" if code and self.color else line


def _first(page: _Page, event: Event) -> None:
    page.text(headline(event) + ".", style="red" if event.kind not in NOT_OOM else "bold")
    why = _NO_OOM_WHY.get(event.kind) or _WHY[event.cause]
    if event.kind != "compat":
        page.text(why + ".")
    if event.evidence:
        page.heading("Evidence")
        for evidence in event.evidence:
            page.item("-", evidence)
        page.item("-", f"line {event.line} of the text, from {event.framework}")
    helping = [advice.text for advice in event.advice if advice.helps]
    if helping:
        page.heading("What to change")
        for number, text in enumerate(helping, 1):
            page.item(f"{number}.", text)
    in_vain = [advice.text for advice in event.advice if not advice.helps]
    if in_vain:
        page.heading("What won't help")
        for text in in_vain:
            page.item("-", text)


def _replan(page: _Page, replan: Replan) -> None:
    page.heading(f"The same run planned: {replan.verdict}")
    page.item("-", replan.reason)
    for c in replan.comparisons:
        if c.stated_bytes is not None and c.planned_bytes is not None:
            page.item(
                "-",
                (
                    f"{c.name}: {format_bytes(c.stated_bytes)} in the text, "
                    f"{format_bytes(c.planned_bytes)} planned"
                ),
            )
    if replan.agrees:
        page.item("-", "the plan and the text agree")
    for difference in replan.differences:
        page.item("-", f"differs: {difference}")
    if replan.recommendation:
        page.item("-", f"run it with {replan.recommendation}")


def _others(page: _Page, diagnosis: Diagnosis) -> None:
    first, *others = diagnosis.events or (None,)
    if first is not None and first.echoes:
        page.heading("Told again")
        page.item(
            "-",
            (
                f"{first.echoes} more mention{'s' * (first.echoes > 1)} of the same failure or of what "
                f"followed from it"
            ),
        )
    if others:
        page.heading(f"After that, {len(others)} more")
        for event in others[:_SHOWN_EVENTS]:
            if event is not None:
                page.item("-", f"line {event.line}: {headline(event)}")
        if len(others) > _SHOWN_EVENTS:
            page.item("-", f"and {len(others) - _SHOWN_EVENTS} more")


def _compat(page: _Page, diagnosis: Diagnosis) -> None:
    if diagnosis.compat:
        page.heading("Known conflicts in this text")
        for match in diagnosis.compat:
            _match(page, match)


def _match(page: _Page, match: CompatMatch) -> None:
    where = "" if match.line is None else f" (line {match.line})"
    page.item("-", f"{match.title}{where}: {match.cause}")
    page.item(" ", f"affected: {match.versions}")
    page.item(" ", f"fix: {match.fix}")


def render_health(health: Health, *, width: int = 80, color: bool = False, plain: bool = False) -> str:
    """The report of `memplan doctor`."""
    page = _Page(width, color)
    count = len(health.problems)
    page.text(
        "No known problem." if not count else f"{count} problem{'s' * (count > 1)} found.", style="bold"
    )
    for problem in health.problems:
        page.item("-", f"{problem.message}. {problem.fix}")
    page.heading("Environment")
    for name, value in _environment(health):
        page.item(f"{name}:", value)
    if health.notes:
        page.heading("Good to know with these versions")
        for note in health.notes:
            page.item("-", f"{note.title}: {note.fix}")
    return clean(page.render(plain)) if not color else page.render(plain)


def _environment(health: Health) -> Iterable[tuple[str, str]]:
    yield "python", health.python
    for name, version in health.versions.items():
        yield name, version or "not installed"
    yield "torch's CUDA", health.torch_cuda or "none"
    yield "bitsandbytes' backends", ", ".join(health.bitsandbytes_backends) or "none"
    yield "GPUs", ", ".join(health.gpus) or "none"
    for name, value in health.settings.items():
        yield name, value
