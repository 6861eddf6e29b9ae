"""memplan: the GPU memory of a fine-tune, predicted by running its training step without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.diagnosis.doctor import Health as Health
    from memplan.diagnosis.doctor import doctor as doctor
    from memplan.diagnosis.parse import diagnose as diagnose
    from memplan.diagnosis.types import Diagnosis as Diagnosis
    from memplan.errors import MemplanError as MemplanError
    from memplan.estimate import Estimate as Estimate
    from memplan.estimate import Plan as Plan
    from memplan.plan import check as check
    from memplan.plan import estimate as estimate
    from memplan.request.types import CardSpec as CardSpec
    from memplan.request.types import Request as Request

__version__ = "0.1.0"

_HOMES = {
    "MemplanError": "memplan.errors",
    "Diagnosis": "memplan.diagnosis.types",
    "diagnose": "memplan.diagnosis.parse",
    "Health": "memplan.diagnosis.doctor",
    "doctor": "memplan.diagnosis.doctor",
    "CardSpec": "memplan.request.types",
    "Request": "memplan.request.types",
    "Estimate": "memplan.estimate",
    "Plan": "memplan.estimate",
    "check": "memplan.plan",
    "estimate": "memplan.plan",
}

__all__ = [
    "CardSpec", "Diagnosis", "Estimate", "Health", "MemplanError", "Plan", "Request", "__version__", "check",
    "diagnose", "doctor", "estimate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import memplan` costs nothing."""
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
