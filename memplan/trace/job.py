"""One job from end to end: load, prepare, steps."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

from memplan.errors import ExitCode, MemplanError
from memplan.models.types import ModelFacts
from memplan.request.types import CardSpec, Request
from memplan.timeline import Timeline
from memplan.trace.finish import classify, repeat_step

TRACED_STEPS = 2
"""The first step makes the optimizer's state; from the second on every step of one process does the same."""
STEPS = 3


def trace_job(
    request: Request, facts: ModelFacts, card: CardSpec | None, *, skip_layers: bool = True
) -> Timeline:
    """See `memplan.trace.trace`; with `skip_layers=False` every layer runs."""
    with _quiet():
        from memplan.trace.depth import DepthMismatchError

        _import_libraries(request)
        _hush()  # transformers sets its own level when it is imported
        # DistributedDataParallel puts its buckets in another order in the second step
        steps = TRACED_STEPS if (request.num_processes or 1) == 1 else STEPS
        try:
            timeline = _run(request, facts, card, steps, skip_layers=skip_layers)
        except DepthMismatchError as error:
            skip_layers = False
            timeline = _run(request, facts, card, steps, skip_layers=False)
            timeline.facts["depth"] = f"traced at full depth: {error}"
        if steps < STEPS:
            repeated = repeat_step(timeline, steps - 1)
            timeline = repeated or _run(request, facts, card, STEPS, skip_layers=skip_layers)
    return timeline


def _run(
    request: Request, facts: ModelFacts, card: CardSpec | None, steps: int, *, skip_layers: bool
) -> Timeline:
    from memplan.trace.as_cuda import CudaTarget, as_cuda
    from memplan.trace.depth import plan_depth
    from memplan.trace.extend import Skipped, extend
    from memplan.trace.load import load_model
    from memplan.trace.ranks import ddp
    from memplan.trace.ranks.group import fake_process_group
    from memplan.trace.recorder import Recorder
    from memplan.trace.step import Steps, begin_training, logits_modules, prepare_model

    recorder = Recorder()
    with (
        fake_process_group(request.num_processes or 1, recorder),
        as_cuda(CudaTarget.of(card), recorder),
        ddp.wrapper(request, recorder) as wrap,
    ):
        model: Any = load_model(request, facts, recorder)
        parameters, weight_bytes = _count(model), _weight_bytes(model)
        model = prepare_model(model, request, recorder)
        recorder.attribution.attach(model)
        recorder.attribution.name_parameters(recorder, model)
        wrapped = begin_training(model, request, recorder, wrap)
        depth = plan_depth(model) if skip_layers else None
        skipped = Skipped()
        with _runs_on_meta(facts, recorder):
            job = Steps(wrapped, model, request, recorder, depth, skipped)
            for step in range(steps):
                job.run(step)
        known: dict[str, Any] = {
            "parameters": parameters,
            "weight_bytes": weight_bytes,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "logits_modules": logits_modules(model, recorder.attribution.modules),
            "notes": list(recorder.notes),
            "operators": recorder.operator_count,
        }
        timeline = recorder.finish(known)
        if depth is not None:
            timeline = extend(timeline, depth, recorder.passes, skipped)
        recorder.attribution.detach()
        del job, wrapped, model
    gc.collect()
    return classify(timeline)


def _import_libraries(request: Request) -> None:
    # before the patches: a library that is imported under them would keep them
    import transformers.masking_utils
    import transformers.modeling_utils
    import transformers.trainer_optimizer  # noqa: F401

    if request.use_peft:
        import peft  # noqa: F401
    optim = str(request.optim)
    by_name = "8bit" in optim or "bnb" in optim or optim.startswith(("paged", "lion", "rmsprop", "ademamix"))
    if request.is_quantized or by_name:
        import bitsandbytes  # noqa: F401


def _count(model: Any) -> int:
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else math.prod(state.shape) for p, state in states)


def _weight_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextlib.contextmanager
def _runs_on_meta(facts: ModelFacts, recorder: Any) -> Iterator[None]:
    try:
        yield
    except MemplanError:
        raise
    except Exception as error:
        phase = recorder.phase
        module = recorder.attribution.modules[recorder.attribution.current()]
        raise MemplanError(
            "not-traceable",
            f"the training step of `{facts.name}` can't run without data",
            context=f"in {phase.name}, module `{module or type(error).__name__}`: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            hint="memplan can't say what this model takes",
            exit_code=ExitCode.UNKNOWN,
        ) from error


_TALKERS = ("transformers", "bitsandbytes", "peft", "torch")


def _hush() -> None:
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The libraries' warnings are about a run that doesn't happen here.
    levels = {name: logging.getLogger(name).level for name in _TALKERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _hush()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
