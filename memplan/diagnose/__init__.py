"""Out-of-memory texts explained. `memplan.diagnose` is also the function, so the package can be called."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.diagnose.types import Diagnosis


class _Callable(ModuleType):
    """A module that answers when it is called."""

    def __call__(self, text: str, **options: Any) -> Diagnosis:
        """What a pasted text says happened, why, and what to change."""
        from memplan.diagnose.parse import diagnose

        return diagnose(text, **options)


sys.modules[__name__].__class__ = _Callable
