"""Replace attributes for a while, and put every one back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Patches:
    """Attributes replaced so far, newest last."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any, bool]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Let `owner.name` be `value` until the patches are undone."""
        own = name in vars(owner) if hasattr(owner, "__dict__") else True
        self._saved.append((owner, name, getattr(owner, name, None), own))
        setattr(owner, name, value)

    def set_everywhere(self, package: str, name: str, old: Any, value: Any) -> None:
        """The same in every loaded module of `package` that imported `old` by name."""
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == package and getattr(module, "__dict__", {}).get(name) is old:
                self.set(module, name, value)

    def undo(self) -> None:
        """Put everything back, newest first."""
        for owner, name, value, own in reversed(self._saved):
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)
        self._saved = []


@contextlib.contextmanager
def patches() -> Iterator[Patches]:
    """Patches that last for the `with` block."""
    made = Patches()
    try:
        yield made
    finally:
        made.undo()
