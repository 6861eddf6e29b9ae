"""Log the birth and death of every storage while real code runs on the meta device.

A storage is born when it first appears in an operator's output and dies when its C++ object does: torch
keeps one Python object per storage for as long as the C++ object lives, so a weak reference on it fires at
that moment. What an operator allocates inside its CUDA kernel is added by `memplan.trace.as_cuda`.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.timeline import Category, Kind, Phase, Timeline
from memplan.trace.attribution import Attribution
from memplan.trace.finish import UNKNOWN_CATEGORY, merge_accumulations
from memplan.trace.shadows import Shadows

Kernel = Callable[..., Any]
WorkspaceSizes = Callable[[tuple[Any, ...], dict[str, Any], Any], list[int]]

_META = torch.device("meta").type
# Operators that give an existing tensor another storage although their schema says that they alias it.
_RESIZING = frozenset({"aten::resize_", "aten::resize_as_", "aten::set_", "aten::lift_fresh"})


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """The dispatch mode under which a job is traced; `finish` gives the `Timeline`.

    `kernels` replaces an operator by code that allocates as its CUDA kernel does; `workspaces` lists what a
    kernel allocates and frees within itself, after its outputs (`workspaces_before`: before them); `handles`
    what it allocates once and keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, Kernel] = {}
        self.workspaces: dict[str, WorkspaceSizes] = {}
        self.workspaces_before: dict[str, WorkspaceSizes] = {}
        self.handles: dict[str, Callable[[Recorder, tuple[Any, ...]], None]] = {}
        self.output_order: dict[str, tuple[int, ...]] = {}
        self.stream: Callable[[], int] | None = None
        self.attribution = Attribution()
        self.shadows = Shadows()
        self.notes: dict[str, None] = {}
        self.operator_count = 0
        self._timeline = Timeline()
        self._category: list[int] = []
        self._default_category = UNKNOWN_CATEGORY
        self._alive: dict[int, tuple[weakref.ref[Any], list[int]]] = {}
        self._ignored: dict[int, weakref.ref[Any]] = {}
        self._phase_index: dict[Phase, int] = {}
        self._operator_index: dict[str, int] = {}
        self._aliases: dict[Any, bool] = {}
        self._composites: dict[Any, bool] = {}
        self._phase = 0
        self._paused = 0
        self._accumulations: set[int] = set()
        self.passes: list[int] = []
        """Events before which a phase was entered."""
        self.enter_phase("load", -1)

    # -- what the step tells ------------------------------------------------------------------------

    def enter_phase(self, name: str, step: int) -> None:
        """From here on events belong to this phase."""
        phase = Phase(name, step)
        index = self._phase_index.get(phase)
        if index is None:
            index = self._phase_index[phase] = len(self._timeline.phases)
            self._timeline.phases.append(phase)
        self._phase = index
        self.passes.append(len(self._timeline))
        self.attribution.enter_phase(name)

    @property
    def phase(self) -> Phase:
        """The phase that events now belong to."""
        return self._timeline.phases[self._phase]

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()` is called here."""
        self._append(Kind.EMPTY_CACHE, 0, 0, "empty_cache", 0)

    def label(self, tensor: torch.Tensor, category: Category) -> None:
        """Say what a tensor's storage is for; logs its birth if it has not been seen."""
        storage = self.track(tensor, "create")
        if storage is not None:
            self._category[storage] = category

    def labelled(self, tensor: torch.Tensor) -> int | None:
        """The storage number of a tensor, None where it is not on the device."""
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[1][0]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made in here lies elsewhere (in host memory, in a file)."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Within `paused`: what is made in here lies on the device after all."""
        paused, self._paused = self._paused, 0
        try:
            yield
        finally:
            self._paused = paused

    def finish(self, facts: dict[str, Any]) -> Timeline:
        """The timeline so far, with gradients accumulated in place as on CUDA; `passes` keeps step with it."""
        self._timeline.category = array("b", self._category)
        self._timeline.facts = facts
        self._timeline.modules = self.attribution.modules
        timeline, self.passes = merge_accumulations(self._timeline, self._accumulations, self.passes)
        return timeline

    # -- events -------------------------------------------------------------------------------------

    def _append(self, kind: Kind, storage: int, size_bytes: int, operator: str, module: int) -> None:
        index = self._operator_index.get(operator)
        if index is None:
            index = self._operator_index[operator] = len(self._timeline.operators)
            self._timeline.operators.append(operator)
        timeline = self._timeline
        timeline.kind.append(kind)
        timeline.storage.append(storage)
        timeline.size_bytes.append(size_bytes)
        timeline.phase.append(self._phase)
        timeline.operator.append(index)
        timeline.module.append(module)
        timeline.stream.append(0 if self.stream is None else self.stream())

    @contextmanager
    def labelling(self, category: Category) -> Iterator[None]:
        """What is born in here and not labelled otherwise is for this."""
        before, self._default_category = self._default_category, int(category)
        try:
            yield
        finally:
            self._default_category = before

    def allocate(self, size_bytes: int, operator: str, category: int = UNKNOWN_CATEGORY) -> int:
        """Log a birth that no tensor stands for; returns its number for `release`."""
        storage = len(self._category)
        self._category.append(self._default_category if category == UNKNOWN_CATEGORY else category)
        self._append(Kind.ALLOC, storage, size_bytes, operator, self.attribution.current())
        return storage

    def release(self, storage: int, size_bytes: int) -> None:
        """Log the death of what `allocate` gave."""
        self._append(Kind.FREE, storage, size_bytes, "free", self.attribution.current())

    def track(self, tensor: torch.Tensor, operator: str) -> int | None:
        """Log the birth of a tensor's storage unless it is known already; its number, None off the device."""
        if tensor.device.type != _META or self._paused:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored:
            return None
        known = self._alive.get(key)
        size_bytes = storage.nbytes()
        if known is not None and known[0]() is storage:
            state = known[1]
            if state[1] != size_bytes:
                self.release(state[0], state[1])
                state[0], state[1] = self.allocate(size_bytes, operator), size_bytes
            return state[0]
        state = [self.allocate(size_bytes, operator), size_bytes]
        self._watch(storage, state)
        return state[0]

    def adopt(self, tensor: torch.Tensor) -> int:
        """Number a storage whose birth is told elsewhere; its death is logged."""
        storage = tensor.untyped_storage()
        number = len(self._category)
        self._category.append(Category.GRADIENTS)
        self._watch(storage, [number, storage.nbytes()])
        return number

    def ignore(self, tensor: torch.Tensor) -> None:
        """A meta tensor that stands for host memory."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._ignored[key] = weakref.ref(storage, lambda _: self._ignored.pop(key, None))

    def _watch(self, storage: torch.UntypedStorage, state: list[int]) -> None:
        key = storage._cdata

        def died(_: Any) -> None:
            entry = self._alive.get(key)
            if entry is not None and entry[1] is state:
                del self._alive[key]
                self.shadows.forget(key)
            self.release(state[0], state[1])

        self._alive[key] = (weakref.ref(storage, died), state)

    # -- the mode -----------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if self._paused:
            return self.shadows.run(self, func, name, args, kwargs)
        self.operator_count += 1
        self.attribution.at_operator(self, args)
        kernel = self.kernels.get(name)
        if kernel is not None:
            with self:
                return kernel(*args, **kwargs)
        if self._is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if name == "aten::add" and self.attribution.in_backward:
            out = func(*args, **kwargs)
            self._track_accumulation(out, args)
            return out
        out = self.shadows.run(self, func, name, args, kwargs)
        before = self.workspaces_before.get(name)
        if before is not None:
            self.use(before(args, kwargs, out), name)
        if not self._is_alias(func):
            self._track_outputs(out, name)
        if name in self.handles:
            self.handles[name](self, args)
        workspace = self.workspaces.get(name)
        if workspace is not None:
            self.use(workspace(args, kwargs, out), name)
        return out

    def use(self, sizes_bytes: list[int], operator: str) -> None:
        """Buffers that a kernel holds together and frees when it is done."""
        held = [(self.allocate(size, operator, Category.WORKSPACES), size) for size in sizes_bytes]
        for storage, size_bytes in held:
            self.release(storage, size_bytes)

    def _is_composite(self, func: Any) -> bool:
        # Inside a kernel, below autograd, operators that are made of others arrive in one piece.
        composite = self._composites.get(func)
        if composite is None:
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
            # one that has a kernel for the CPU (silu_backward) has one for CUDA too, and doesn't come apart
            composite = has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(
                func.name(), "CPU"
            )
            self._composites[func] = composite
        return composite

    def _is_alias(self, func: Any) -> bool:
        alias = self._aliases.get(func)
        if alias is None:
            schema = func._schema
            alias = self._aliases[func] = (
                schema.name not in _RESIZING
                and bool(schema.returns)
                and all(r.alias_info is not None for r in schema.returns)
            )
        return alias

    def _track_outputs(self, out: Any, name: str) -> None:
        if isinstance(out, torch.Tensor):
            self.track(out, name)
        elif isinstance(out, (tuple, list)):
            order = self.output_order.get(name)
            for item in out if order is None else [out[i] for i in order]:
                self._track_outputs(item, name)

    def _track_accumulation(self, out: torch.Tensor, args: tuple[Any, ...]) -> None:
        """Note a sum that the autograd engine makes in place on CUDA but not under a dispatch mode.

        torch/csrc/autograd/input_buffer.cpp adds into the first gradient when it holds its only reference,
        which a view never is (its base holds another), and never under a dispatch mode.
        """
        storage = self.track(out, "aten::add")
        first, second = args[0], args[1]
        if (
            storage is not None
            and not torch.is_grad_enabled()
            and isinstance(second, torch.Tensor)
            and first.shape == second.shape
            and not first._is_view()
        ):
            self._accumulations.add(storage)
