"""Run the training step on the meta device and log what it allocates: the one part that needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memplan.models.types import ModelFacts
    from memplan.request.types import CardSpec, Request
    from memplan.timeline import Timeline


def trace(request: Request, facts: ModelFacts, card: CardSpec | None) -> Timeline:
    """The timeline of a job on a card, as rank 0 sees it; the request's defaults are resolved.

    Raises `MemplanError` where the model can't be built or its code can't run on meta.
    """
    from memplan.trace.job import trace_job

    return trace_job(request, facts, card)
