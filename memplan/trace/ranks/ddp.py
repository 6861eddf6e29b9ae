"""DistributedDataParallel: torch's own wrapper and reducer, with an all-reduce that returns its bucket."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from memplan.request.types import Request
from memplan.timeline import Category
from memplan.trace.as_cuda.patching import patches
from memplan.trace.recorder import Recorder


@contextmanager
def wrapper(request: Request, recorder: Recorder) -> Iterator[Any]:
    """A function that wraps a model as accelerate does for `num_processes` > 1; None for one process."""
    if (request.num_processes or 1) <= 1:
        yield None
        return
    import torch.nn.parallel.distributed as distributed

    def wrap(model: nn.Module) -> nn.Module:
        find_unused = request.ddp_find_unused_parameters
        with recorder.labelling(Category.COMMUNICATION):
            wrapped = distributed.DistributedDataParallel(model, find_unused_parameters=bool(find_unused))
        wrapped.register_comm_hook(None, _keep_bucket)
        prepare = wrapped._pre_forward

        def pre_forward(*args: Any, **kwargs: Any) -> Any:
            with recorder.labelling(Category.COMMUNICATION):  # the reducer rebuilds its buckets here
                return prepare(*args, **kwargs)

        wrapped._pre_forward = pre_forward
        return wrapped

    with patches() as patch:
        # it compares shapes between ranks, of which there is one
        patch.set(distributed, "_verify_param_shape_across_processes", lambda *args, **kwargs: None)
        yield wrap


def _keep_bucket(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
