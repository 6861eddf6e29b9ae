"""From raw events to a timeline: accumulate gradients in place, say what each storage is for, repeat a step."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import replace

from memplan.timeline import Category, Kind, Timeline

UNKNOWN_CATEGORY = -1
_EVENT_COLUMNS = ("kind", "storage", "size_bytes", "phase", "operator", "module", "stream")


def merge_accumulations(
    timeline: Timeline, candidates: set[int], passes: list[int]
) -> tuple[Timeline, list[int]]:
    """Sums of gradients that CUDA makes in place: the sum takes the storage of its first term.

    A candidate is in place when the birth of the sum is followed at once by the death of an equal storage.
    `passes` are event numbers; they come back as numbers in the new timeline.
    """
    out = Timeline(
        phases=timeline.phases,
        operators=timeline.operators,
        modules=timeline.modules,
        facts=timeline.facts,
        category=timeline.category,
    )
    kind, storage, size = timeline.kind, timeline.storage, timeline.size_bytes
    renamed: dict[int, int] = {}
    keep: list[int] = []
    count, index = len(timeline), 0
    while index < count:
        if (
            kind[index] == Kind.ALLOC
            and storage[index] in candidates
            and index + 1 < count
            and kind[index + 1] == Kind.FREE
            and size[index + 1] == size[index]
        ):
            first = renamed.get(storage[index + 1], storage[index + 1])
            renamed[storage[index]] = first
            if out.category[first] == UNKNOWN_CATEGORY:
                out.category[first] = timeline.category[storage[index]]
            index += 2
            continue
        keep.append(index)
        index += 1
    for name in _EVENT_COLUMNS:
        column = getattr(timeline, name)
        setattr(out, name, array(column.typecode, [column[i] for i in keep]))
    out.storage = array("i", [renamed.get(s, s) for s in out.storage])
    return out, [bisect_left(keep, event) for event in passes]


def classify(timeline: Timeline) -> Timeline:
    """Fill in the category of each storage that nothing has labelled, from where it was born and where it died."""
    names = [phase.name for phase in timeline.phases]
    logits = set(timeline.facts.get("logits_modules", ()))
    is_logits = [name in logits for name in timeline.modules]
    born: dict[int, int] = {}
    category = timeline.category
    for index, kind in enumerate(timeline.kind):
        storage = timeline.storage[index]
        if kind == Kind.ALLOC:
            born[storage] = index
        elif kind == Kind.FREE and category[storage] == UNKNOWN_CATEGORY:
            birth = born[storage]
            category[storage] = _category(
                names[timeline.phase[birth]],
                names[timeline.phase[index]],
                timeline.phase[birth] == timeline.phase[index],
                is_logits[timeline.module[birth]],
            )
    for storage, birth in born.items():
        if category[storage] == UNKNOWN_CATEGORY:
            category[storage] = _category(names[timeline.phase[birth]], "", False, False)
    return timeline


def _category(born: str, died: str, same_phase: bool, is_logits: bool) -> Category:
    if born == "data":
        return Category.INPUTS
    if born == "backward" and died not in ("backward", "forward"):
        return Category.GRADIENTS
    if born in ("forward", "backward") and is_logits:
        return Category.LOGITS_AND_LOSS
    if born == "forward" and not same_phase:
        return Category.ACTIVATIONS
    if born == "optimizer" and not same_phase:
        return Category.OPTIMIZER_STATE
    if born in ("load", "prepare") and died not in ("load", "prepare"):
        return Category.BUFFERS
    return Category.TEMPORARIES


def repeat_step(timeline: Timeline, step: int) -> Timeline | None:
    """The timeline with `step` done once more; None where what outlives the step doesn't show how.

    From the second step on every step does the same, so one trace serves for all later ones. What is left
    over by the step before is freed in `step` at the places where what it leaves itself is freed next time.
    """
    of_step = [i for i, p in enumerate(timeline.phase) if timeline.phases[p].step == step]
    if not of_step or of_step[-1] != len(timeline) - 1:
        return None
    first = of_step[0]
    born_in = set()
    left_over: list[int] = []
    for index in range(first, len(timeline)):
        if timeline.kind[index] == Kind.ALLOC:
            born_in.add(timeline.storage[index])
    died_in = {timeline.storage[i] for i in range(first, len(timeline)) if timeline.kind[i] == Kind.FREE}
    left_over = sorted(born_in - died_in)
    inherited = sorted(died_in - born_in)
    sizes = {
        timeline.storage[i]: timeline.size_bytes[i] for i in range(len(timeline)) if timeline.kind[i] == 0
    }
    if [sizes[s] for s in left_over] != [sizes[s] for s in inherited]:
        return None
    fresh = len(timeline.category)
    new_number = {storage: fresh + k for k, storage in enumerate(sorted(born_in))}
    freed_instead = dict(zip(inherited, left_over, strict=True))
    phases = list(timeline.phases)
    phase_of: dict[int, int] = {}
    out = Timeline(
        phases=phases, operators=timeline.operators, modules=timeline.modules, facts=timeline.facts
    )
    for name in _EVENT_COLUMNS:
        setattr(out, name, array(getattr(timeline, name).typecode, getattr(timeline, name)))
    for name in ("kind", "size_bytes", "operator", "module", "stream"):
        getattr(out, name).extend(getattr(timeline, name)[first:])
    for index in range(first, len(timeline)):
        storage, phase = timeline.storage[index], timeline.phase[index]
        if storage in new_number:
            out.storage.append(new_number[storage])
        else:
            out.storage.append(freed_instead.get(storage, storage))
        if phase not in phase_of:
            phase_of[phase] = len(phases)
            phases.append(replace(phases[phase], step=step + 1))
        out.phase.append(phase_of[phase])
    out.category = array("b", timeline.category)
    out.category.extend(timeline.category[s] for s in sorted(born_in))
    return out
