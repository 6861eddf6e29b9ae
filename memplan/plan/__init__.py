"""The answer to a request: how much memory, does it fit, what would."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from memplan.errors import ExitCode, MemplanError
from memplan.estimate import Alternative, Estimate, Plan
from memplan.request.types import CardSpec, Request

if TYPE_CHECKING:
    from memplan.allocator import AllocConf
    from memplan.models.types import ModelFacts
    from memplan.plan.limits import Boundary
    from memplan.timeline import Timeline

VERIFIED = {"torch": ("2.11", "2.13"), "transformers": ("5.17",), "accelerate": ("1.15",), "peft": ("0.21",)}
"""Versions whose predictions were compared with measured runs (torch 2.11 ran, torch 2.13 traced)."""
ENOUGH = 3
"""Alternatives that are traced at most for one answer."""


def estimate(request: Request, *, use_cache: bool = True) -> Estimate:
    """The memory of a job, rank by rank. Raises `MemplanError` for what can't be answered."""
    return _answer(request, use_cache).estimate


def boundary(request: Request, *, use_cache: bool = True) -> Boundary:
    """The least memory that torch must be allowed on rank 0's card for the job to run through.

    Raises `MemplanError` for what can't be answered.
    """
    from memplan.plan.limits import boundary_of
    from memplan.plan.ranks import on_card

    answer = _answer(request, use_cache)
    card = answer.cards[0] if answer.cards else None
    return boundary_of(on_card(answer.timeline, card.total_bytes if card else None), answer.conf)


def check(request: Request, *, use_cache: bool = True) -> Plan:
    """Whether a job fits its cards, why, and what would where it doesn't.

    Raises `MemplanError` for bad input; a model whose code can't run without data gives the verdict
    `unknown`.
    """
    started = time.perf_counter()
    try:
        answer = _answer(request, use_cache)
    except MemplanError as error:
        if error.exit_code is not ExitCode.UNKNOWN:
            raise
        return _unknown(request, error, time.perf_counter() - started)
    from memplan.plan.verdict import judge

    verdict, reason, failure = judge(answer.estimate, answer.timeline, answer.cards, answer.conf)
    found: tuple[Alternative, ...] = ()
    if verdict == "does not fit":
        is_fragmented = failure is not None and failure.kind == "fragmentation"
        found = _alternatives(answer, use_cache, is_fragmented)
    return Plan(
        request=answer.estimate.request,
        verdict=verdict,
        reason=reason,
        estimate=answer.estimate,
        failure=failure,
        alternatives=found,
        hints=_hints(answer, found),
        origins=answer.estimate.request.origins,
        versions=answer.estimate.versions,
        seconds=time.perf_counter() - started,
        cached=answer.cached,
    )


@dataclass(frozen=True)
class _Answer:
    estimate: Estimate
    timeline: Timeline
    cards: tuple[CardSpec, ...]
    conf: AllocConf
    facts: ModelFacts
    cached: bool
    warnings: tuple[str, ...]


def _answer(
    request: Request,
    use_cache: bool,
    facts: ModelFacts | None = None,
    timeline: Timeline | None = None,
) -> _Answer:
    """Resolve, trace and replay; `timeline` is of the same step, where it was traced before."""
    from memplan.allocator import AllocConf
    from memplan.models.resolve import resolve
    from memplan.plan.ranks import estimate_rank
    from memplan.request.defaults import resolve_defaults
    from memplan.request.validate import length_warnings, validate
    from memplan.trace.cache import cached_trace, library_versions

    started = time.perf_counter()
    validate(request)
    conf = AllocConf.parse(request.alloc_conf)
    if facts is None:
        facts = resolve(
            request.model,
            revision=request.revision,
            token=request.token,
            trust_remote_code=request.trust_remote_code,
        )
    limit = _position_limit(facts.config)
    resolved = resolve_defaults(request, checkpoint_dtype=facts.checkpoint_dtype, position_limit=limit)
    validate(resolved)
    cards = resolved.cards[: resolved.num_processes]  # `validate` has seen that there are enough
    cached = True
    notes: tuple[str, ...] = ()
    if timeline is None:
        card = cards[0] if cards else None
        timeline, cached, notes = cached_trace(resolved, facts, card, use_cache=use_cache)
    ranks = []
    known: dict[CardSpec | None, Any] = {}
    for rank in range(resolved.num_processes or 1):
        card = cards[rank] if cards else None
        if card not in known:
            known[card] = estimate_rank(timeline, rank=rank, card=card, conf=conf)
        ranks.append(replace(known[card], rank=rank))
    result = Estimate(
        request=resolved,
        ranks=tuple(ranks),
        facts={**timeline.facts, "source": facts.source, "name": facts.name},
        versions=library_versions(),
        notes=(
            *notes,
            *facts.notes,
            *timeline.facts.get("notes", ()),
            *_version_notes(),
            *_card_notes(cards, resolved),
            *_host_notes(resolved, timeline),
        ),
        seconds=time.perf_counter() - started,
    )
    return _Answer(
        result, timeline, cards, conf, facts, cached, length_warnings(resolved, position_limit=limit)
    )


def _alternatives(answer: _Answer, use_cache: bool, is_fragmented: bool) -> tuple[Alternative, ...]:
    from memplan.plan.alternatives import changes
    from memplan.plan.verdict import judge

    request = answer.estimate.request
    last: tuple[Alternative, ...] = ()
    traced = 0
    for change in changes(request, is_fragmented=is_fragmented):
        same_step = answer.timeline if change.keys() == {"alloc_conf"} else None
        traced += same_step is None
        if traced > ENOUGH:
            break
        try:
            other = _answer(replace(request, **change), use_cache, answer.facts, same_step)
        except MemplanError:
            continue
        verdict, reason, _ = judge(other.estimate, other.timeline, other.cards, other.conf)
        last = (Alternative(change=change, verdict=verdict, reason=reason, estimate=other.estimate),)
        if verdict in ("fits", "tight"):
            break
    return last


def _hints(answer: _Answer, alternatives: tuple[Alternative, ...]) -> tuple[str, ...]:
    from memplan.plan.alternatives import as_options

    hints = list(answer.warnings)
    for alternative in alternatives:
        options = as_options(alternative.change)
        if alternative.verdict in ("fits", "tight"):
            hints.append(f"run it with `{options}`: it {alternative.reason}")
        else:
            hints.append(f"`{options}` alone does not make it fit: {alternative.reason}")
    return tuple(hints)


def _unknown(request: Request, error: MemplanError, seconds: float) -> Plan:
    from memplan.trace.cache import library_versions

    reason = error.message if error.context is None else f"{error.message}: {error.context}"
    return Plan(
        request=request,
        verdict="unknown",
        reason=reason,
        estimate=None,
        hints=(error.hint,) if error.hint else (),
        origins=request.origins,
        versions=library_versions(),
        seconds=seconds,
    )


def _position_limit(config: Mapping[str, Any]) -> int | None:
    inner = config.get("text_config")
    for fields in (config, inner if isinstance(inner, Mapping) else {}):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = fields.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _version_notes() -> tuple[str, ...]:
    from memplan.trace.cache import library_versions

    notes = []
    for name, version in library_versions().items():
        checked = VERIFIED.get(name)
        if checked and not any(version.startswith(v + ".") for v in checked):
            notes.append(
                f"{name} {version} is not among the versions compared with measured runs"
                f" ({', '.join(checked)})"
            )
    return tuple(notes)


def _host_notes(request: Request, timeline: Timeline) -> tuple[str, ...]:
    """Of this machine, where the job would run on its cards; of another one nothing is known."""
    origin = request.origins.get("cards")
    if origin is None or origin.stated:
        return ()
    from memplan.plan.host import host, host_notes

    weight_bytes = int(timeline.facts.get("weight_bytes", 0))
    return host_notes(host(), weight_bytes=weight_bytes, processes=request.num_processes or 1)


def _card_notes(cards: tuple[CardSpec, ...], request: Request) -> tuple[str, ...]:
    from memplan.gpus.context import non_torch_bytes

    notes = [f"CUDA context of {card.name}: {non_torch_bytes(card)[1]}" for card in dict.fromkeys(cards)]
    if len({(card.compute_capability, card.multiprocessor_count) for card in cards}) > 1:
        notes.append(f"the cards' kernels differ; every rank is traced with those of {cards[0].name}")
    if (request.num_processes or 1) > 1:
        notes.append("NCCL's own buffers are not measured and not counted")
    return tuple(notes)
