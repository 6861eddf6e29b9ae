"""The buffer of a reduction that several blocks share (ATen/native/cuda/Reduce.cuh, setReduceConfig)."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from memplan.trace.as_cuda.target import CudaTarget

_MAX_THREADS = 512
_WARP = 32
_THREADS_PER_MULTIPROCESSOR = 2048
_MIN_VALUES_PER_THREAD = 16
_MAX_VALUES_PER_THREAD = 256
_ACCUMULATOR_BYTES = 4


def reduction_workspace(target: CudaTarget, args: tuple[Any, ...], out: Any) -> list[int]:
    """Bytes of the shared buffer and of the semaphores; empty where one block makes each output.

    For a dense input whose slow dimensions are summed away (gradients of biases and of norm weights), or
    its fast ones, or all of it. The buffer holds `outputs × blocks per output × block width × vector` values:
    torch does allocate that much.
    """
    source = args[0]
    if not isinstance(out, torch.Tensor) or out.numel() == 0 or source.dim() == 0:
        return []
    if not torch.ops.aten.is_non_overlapping_and_dense(source):
        return []
    dims = args[1] if len(args) > 1 and args[1] is not None else list(range(source.dim()))
    summed = {d % source.dim() for d in ([dims] if isinstance(dims, int) else dims)} or set(
        range(source.dim())
    )
    outputs, inputs = out.numel(), source.numel() // out.numel()
    if inputs < 2:
        return []
    # in the order of memory, fastest first, as TensorIterator sorts and joins them
    order = sorted((d for d in range(source.dim()) if source.shape[d] > 1), key=source.stride)
    groups = [d in summed for d in order]
    changes = sum(a != b for a, b in itertools.pairwise(groups))
    if changes > 1:
        return []  # summed, kept and summed again: not met in training
    if groups[0]:
        return _over_fastest(target, outputs, inputs, vectorized=changes == 0 and inputs > 128)
    return _over_leading(target, outputs, inputs)


def _over_leading(target: CudaTarget, outputs: int, inputs: int) -> list[int]:
    vector = 4
    while outputs % vector:
        vector //= 2
    limit = _MAX_THREADS // vector
    width, height = _block(outputs // vector, inputs, limit)
    per_thread, height_splits = inputs, False
    if per_thread >= min(height * 16, _MAX_VALUES_PER_THREAD):
        per_thread, height_splits = -(-inputs // height), True
    outputs_per_block = width * vector * (1 if height_splits else height)
    grid = -(-outputs // outputs_per_block)
    blocks = _blocks_per_output(target, grid, per_thread, width * height) if height_splits else 1
    if blocks <= 1:
        return []
    return [_ACCUMULATOR_BYTES * outputs * blocks * width * vector, 4 * grid]


def _over_fastest(target: CudaTarget, outputs: int, inputs: int, *, vectorized: bool) -> list[int]:
    width, height = _block(inputs // 4 if vectorized else inputs, outputs, _MAX_THREADS)
    per_thread = -(-inputs // width)
    height_splits = per_thread >= min(height * 16, _MAX_VALUES_PER_THREAD)
    if height_splits:
        per_thread = -(-per_thread // height)
    grid = -(-outputs // (1 if height_splits else height))
    blocks = _blocks_per_output(target, grid, per_thread, width * height) if height_splits else 1
    if blocks <= 1:
        return []
    return [_ACCUMULATOR_BYTES * outputs * blocks, 4 * grid]


def _block(fast: int, slow: int, limit: int) -> tuple[int, int]:
    fast_power = _last_power_of_2(fast) if fast < limit else limit
    slow_power = _last_power_of_2(slow) if slow < limit else limit
    width = min(fast_power, _WARP)
    height = min(slow_power, limit // width)
    width = min(fast_power, limit // height)
    return width, height


def _blocks_per_output(target: CudaTarget, grid: int, per_thread: int, threads: int) -> int:
    most = target.multiprocessor_count * (_THREADS_PER_MULTIPROCESSOR // threads)
    if per_thread < _MAX_VALUES_PER_THREAD or grid > most:
        return 1
    enough = min(-(-most // grid), -(-per_thread // _MIN_VALUES_PER_THREAD))
    return max(enough, -(-per_thread // _MAX_VALUES_PER_THREAD))


def _last_power_of_2(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)
