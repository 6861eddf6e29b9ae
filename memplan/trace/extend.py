"""The timeline of the deep model, from one in which the middle layers were skipped (see `depth`)."""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from memplan.timeline import Kind, Timeline
from memplan.trace.depth import Depth, DepthMismatchError, layer_of

_PASSES = ("forward", "backward")
Place = tuple[int, int, object]
"""Where a storage was born: pass (-1: it holds a parameter), layer, and what it is there."""


@dataclass
class Skipped:
    """What is known of the layers that didn't run: their parameters' and gradients' storages."""

    parameters: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Storage → layer and the parameter's name in it, for every layer."""
    gradients: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    """Storage → step, layer and parameter name; of skipped layers the storage was adopted, never born."""


def extend(timeline: Timeline, depth: Depth, passes: list[int], known: Skipped) -> Timeline:
    """Repeat the template's events. `passes` are the events at which a phase was entered.

    Raises `DepthMismatchError` where an event can't be placed.
    """
    return _Extension(timeline, depth, passes, known).run()


class _Extension:
    def __init__(self, timeline: Timeline, depth: Depth, passes: list[int], known: Skipped) -> None:
        self._in, self._depth, self._known = timeline, depth, known
        self._pass_starts = passes
        self._out = Timeline(
            phases=timeline.phases,
            operators=timeline.operators,
            modules=timeline.modules,
            facts=timeline.facts,
            category=array("b", timeline.category),
        )
        find = layer_of(depth)
        self._layer_of_module = [find(name) for name in timeline.modules]
        self._shift = len(depth.skipped)
        self._copies = self._shift // depth.period
        self._place: dict[int, Place] = {}
        self._storage_at: dict[Place, int] = {}
        self._size: dict[int, int] = {}
        self._new: dict[tuple[int, int], int] = {}
        self._gradient_at = {where: storage for storage, where in known.gradients.items()}

    def run(self) -> Timeline:
        tags = self._tags()
        self._name_storages(tags)
        for start, stop, repeats in self._passes():
            if repeats:
                self._repeat_pass(start, stop, tags)
            else:
                for event in range(start, stop):
                    self._emit(event, self._in.storage[event])
        self._check_deaths()
        return self._out

    def _check_deaths(self) -> None:
        """A copy must lose what its template loses, once."""
        out, died = self._out, set()
        for kind, storage in zip(out.kind, out.storage, strict=True):
            if kind == Kind.FREE:
                if storage in died:
                    raise DepthMismatchError("a storage would die twice")
                died.add(storage)
        for (storage, copy), number in self._new.items():
            if (storage in died) != (number in died):
                raise DepthMismatchError(f"copy {copy} of a layer keeps or loses what its template doesn't")

    # -- what is where ------------------------------------------------------------------------------

    def _passes(self) -> Iterator[tuple[int, int, bool]]:
        starts = sorted({0, *self._pass_starts, len(self._in)})
        for start, stop in itertools.pairwise(starts):
            name = self._in.phases[self._in.phase[start]].name
            yield start, stop, name in _PASSES

    def _tags(self) -> list[int]:
        """The layer of each event; what comes between two layers belongs to the one before it."""
        tags: list[int] = []
        for start, stop, repeats in self._passes():
            tag = -1
            for event in range(start, stop):
                if repeats:
                    layer = self._layer_of_module[self._in.module[event]]
                    tag = layer if layer >= 0 else tag
                tags.append(tag)
        return tags

    def _name_storages(self, tags: list[int]) -> None:
        for storage, (layer, name) in self._known.parameters.items():
            self._put(storage, (-1, layer, name))
        ordinals: dict[tuple[int, int], int] = {}
        for event, kind in enumerate(self._in.kind):
            if kind != Kind.ALLOC:
                continue
            storage = self._in.storage[event]
            self._size[storage] = self._in.size_bytes[event]
            own = self._layer_of_module[self._in.module[event]]
            if tags[event] == own >= 0 and storage not in self._place:
                number = bisect_right(self._pass_starts, event)
                ordinal = ordinals[number, tags[event]] = ordinals.get((number, tags[event]), -1) + 1
                self._put(storage, (number, tags[event], ordinal))

    def _put(self, storage: int, place: Place) -> None:
        self._place[storage] = place
        self._storage_at[place] = storage

    # -- one forward or backward --------------------------------------------------------------------

    def _repeat_pass(self, start: int, stop: int, tags: list[int]) -> None:
        template, runs = self._depth.template, self._runs(start, stop, tags)
        inside = [i for i, (tag, _, _) in enumerate(runs) if tag in template]
        if not inside or inside != list(range(inside[0], inside[-1] + 1)):
            raise DepthMismatchError("the template's layers don't run one after the other")
        order = [tag for tag, _, _ in runs if tag >= 0]
        upward = order == sorted(order)
        if not upward and order != sorted(order, reverse=True):
            raise DepthMismatchError("the layers run in no order")
        first, last = runs[inside[0]][1], runs[inside[-1]][2]
        copies = list(range(1, self._copies + 1))
        self._originals(start, first if not upward else last, runs)
        for copy in copies if upward else reversed(copies):
            for event in range(first, last):
                self._emit_copy(event, tags[event], copy)
        self._originals(first if not upward else last, stop, runs)

    def _runs(self, start: int, stop: int, tags: list[int]) -> list[tuple[int, int, int]]:
        runs: list[tuple[int, int, int]] = []
        for event in range(start, stop):
            if runs and runs[-1][0] == tags[event]:
                runs[-1] = (tags[event], runs[-1][1], event + 1)
            else:
                runs.append((tags[event], event, event + 1))
        return runs

    def _originals(self, start: int, stop: int, runs: list[tuple[int, int, int]]) -> None:
        for tag, first, last in runs:
            together = None
            for event in range(max(first, start), min(last, stop)):
                storage = self._in.storage[event]
                if self._in.kind[event] != Kind.FREE or storage not in self._place:
                    self._emit(event, storage)
                    continue
                together = self._freed_together(first, last) if together is None else together
                if self._place[storage] in together:
                    self._emit(event, storage)
                    for copy in range(1, self._copies + 1):
                        self._emit(event, self._of_copy(storage, copy))
                else:
                    self._emit(event, self._neighbour(storage, tag, 0) if tag >= 0 else storage)

    def _freed_together(self, first: int, last: int) -> set[Place]:
        """What of the template dies for all layers at once in one run: weights that autocast had cast, say.

        It does when the layer one period before, which is of the same kind, loses the same in this run.
        """
        freed = {
            self._place[self._in.storage[event]]
            for event in range(first, last)
            if self._in.kind[event] == Kind.FREE and self._in.storage[event] in self._place
        }
        period, template = self._depth.period, self._depth.template
        return {
            (where, layer, what)
            for where, layer, what in freed
            if layer in template and (where, layer - period, what) in freed
        }

    def _emit_copy(self, event: int, tag: int, copy: int) -> None:
        storage = self._in.storage[event]
        if self._in.kind[event] == Kind.ALLOC:
            target = self._of_copy(storage, copy)
        elif self._in.kind[event] == Kind.FREE:
            if storage not in self._place:
                raise DepthMismatchError("a layer of the template frees what belongs to no layer")
            target = self._neighbour(storage, tag, copy)
        else:
            target = storage
        self._emit(event, target)

    def _neighbour(self, storage: int, tag: int, copy: int) -> int:
        """The storage that stands to layer `tag` of a copy as `storage` stands to layer `tag`."""
        where, home, what = self._place[storage]
        distance = self._position(home) - self._position(tag)
        if abs(distance) > self._depth.period:
            if copy:
                raise DepthMismatchError("a layer of the template reaches beyond its neighbours")
            return storage
        target = tag + copy * self._depth.period + distance
        if tag >= self._depth.tail.start or tag < self._depth.template.start or copy == 0:
            target = tag + distance
        if not 0 <= target < self._depth.count:
            raise DepthMismatchError("an event reaches beyond the layers")
        if target < self._depth.skipped.start or target >= self._depth.skipped.stop or where < 0:
            return self._same_size(storage, (where, target, what))
        offset = (target - self._depth.template.start) % self._depth.period
        equal = self._depth.template.start + offset
        found = self._same_size(storage, (where, equal, what))
        return self._of_copy(found, (target - equal) // self._depth.period)

    def _position(self, layer: int) -> int:
        return layer - self._shift if layer >= self._depth.tail.start else layer

    def _same_size(self, storage: int, place: Place) -> int:
        found = self._storage_at.get(place)
        if found is None or self._size.get(found) != self._size.get(storage):
            raise DepthMismatchError(
                f"layers {self._place[storage][1]} and {place[1]} don't hold the same at {place[2]} of pass"
                f" {place[0]}"
            )
        return found

    def _of_copy(self, storage: int, copy: int) -> int:
        """The number of a template storage's counterpart in a copy; a gradient's was adopted."""
        gradient = self._known.gradients.get(storage)
        if gradient is not None:
            step, layer, name = gradient
            adopted = self._gradient_at.get((step, layer + copy * self._depth.period, name))
            if adopted is None:
                raise DepthMismatchError("a gradient has no counterpart")
            return adopted
        number = self._new.get((storage, copy))
        if number is None:
            number = self._new[storage, copy] = len(self._out.category)
            self._out.category.append(self._in.category[storage])
        return number

    def _emit(self, event: int, storage: int) -> None:
        source, out = self._in, self._out
        out.kind.append(source.kind[event])
        out.storage.append(storage)
        out.size_bytes.append(source.size_bytes[event])
        out.phase.append(source.phase[event])
        out.operator.append(source.operator[event])
        out.module.append(source.module[event])
        out.stream.append(source.stream[event])
