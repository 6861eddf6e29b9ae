"""Which module an operator runs for: in forward by hooks, in backward by the autograd node's age."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from memplan.trace.recorder import Recorder

_OLDEST_LEAF = 1 << 62
"""Sequence numbers at and above this belong to nodes that accumulate into leaves (torch gives them 2**64-1)."""


class Attribution:
    """Follows the module that is running; `current` is its index in `modules` (0: none)."""

    def __init__(self) -> None:
        self.modules: list[str] = [""]
        self.in_backward = False
        self._index: dict[str, int] = {"": 0}
        self._stack: list[int] = []
        self._now = 0
        self._boundaries: list[int] = [0]
        self._boundary_modules: list[int] = [0]
        self._by_storage = False
        self._storage_module: dict[int, int] = {}
        self._handles: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Follow the forward of every module of `model`, under the names it has there."""
        self.detach()
        for name, module in model.named_modules():
            index = self._number(name)
            self._handles.append(module.register_forward_pre_hook(self._entered(index), prepend=True))
            self._handles.append(module.register_forward_hook(self._left(), always_call=True))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def name_parameters(self, recorder: Recorder, model: nn.Module) -> None:
        """Optimizer operators belong to the module whose parameter they update."""
        for name, parameter in model.named_parameters():
            storage = recorder.labelled(parameter)
            if storage is not None:
                self._storage_module[storage] = self._number(name.rpartition(".")[0])

    def enter_phase(self, name: str) -> None:
        """Choose how operators are attributed in this phase."""
        self.in_backward = name == "backward"
        self._by_storage = name in ("clip", "optimizer")
        if not self.in_backward:
            self._now = 0
        if name == "forward":
            del self._boundaries[1:], self._boundary_modules[1:]

    def current(self) -> int:
        """The index of the module that runs now."""
        return self._stack[-1] if self._stack else self._now

    def at_operator(self, recorder: Recorder, args: tuple[Any, ...]) -> None:
        """Look up whom the next operator works for, where no module's forward is running."""
        if self._stack:
            return
        if self.in_backward:
            node = torch._C._current_autograd_node()
            if node is not None:
                age = node._sequence_nr()
                if age < _OLDEST_LEAF:
                    self._now = self._boundary_modules[bisect_right(self._boundaries, age) - 1]
        elif self._by_storage and args and isinstance(args[0], torch.Tensor):
            storage = recorder.labelled(args[0])
            if storage is not None:
                self._now = self._storage_module.get(storage, self._now)

    def _number(self, name: str) -> int:
        index = self._index.get(name)
        if index is None:
            index = self._index[name] = len(self.modules)
            self.modules.append(name)
        return index

    def _mark(self) -> None:
        age = torch._C._autograd._get_sequence_nr()
        module = self.current()
        if self._boundaries[-1] == age:
            self._boundary_modules[-1] = module
        else:
            self._boundaries.append(age)
            self._boundary_modules.append(module)

    def _entered(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self._stack.append(index)
            self._mark()

        return hook

    def _left(self) -> Any:
        def hook(*_: Any) -> None:
            self._stack.pop()
            self._mark()

        return hook
