"""What CUDA kernels allocate within themselves: cuBLAS handles, attention, reductions, embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from memplan.timeline import Category
from memplan.trace.as_cuda.reductions import reduction_workspace
from memplan.trace.as_cuda.target import CudaTarget
from memplan.trace.recorder import Recorder
from memplan.units import KIB, MIB

CUBLAS_WORKSPACE_HOPPER_BYTES = 32 * MIB
"""Per handle and stream on compute capability 9.0 (ATen/cuda/CublasHandlePool.cpp: `:4096:2:16:8` below it,
32 MiB on Hopper). Seen in both allocator histories of an H100, torch 2.11.0+cu130."""
CUBLAS_WORKSPACE_BYTES = (4096 * 2 + 16 * 8) * KIB
CUBLASLT_WORKSPACE_BYTES = 1 * MIB
"""Seen in the same histories at the first GEMM with a bias of each thread."""

SORTED_EMBEDDING_ROWS = 3072
"""embedding_dense_backward sorts above this number of indices (ATen/native/cuda/Embedding.cu)."""
SORT_TILE = 2048
"""Pairs that one block of cub's radix sort takes, without temporary storage; seen at 2,048, not at 3,600."""
SCAN_BYTES = 1 * KIB
"""Temporary storage of cub's scan over a vector that one block takes; seen in an H100's history."""
SMALL_SORT = 4096
"""Elements up to which torch sorts a row in one block, without buffers (ATen/native/cuda/Sort.cu)."""
FOREACH_CHUNK = 65536
"""Elements that one block of a multi-tensor kernel takes: kChunkSize in ATen/native/cuda/MultiTensorApply.cuh."""
_ROWS_PER_SEGMENT = 10
"""NROWS_PER_THREAD in ATen/native/cuda/EmbeddingBackwardKernel.cu."""


@contextlib.contextmanager
def installed(target: CudaTarget, recorder: Recorder) -> Iterator[None]:
    """Put the sizes in the recorder."""
    recorder.workspaces.update(
        {
            "aten::_scaled_dot_product_cudnn_attention": lambda args, kwargs, out: [256],
            "aten::_scaled_dot_product_cudnn_attention_backward": _cudnn_attention_backward,
            "aten::_scaled_dot_product_flash_attention_backward": _flash_attention_backward,
            "aten::_scaled_dot_product_efficient_attention_backward": _efficient_attention_backward,
            "aten::embedding_dense_backward": _embedding_backward,
            "aten::sum": lambda args, kwargs, out: (
                _converted_input(args, kwargs, out) + reduction_workspace(target, args, out)
            ),
            "aten::mm": _copied_operands,
            "aten::addmm": _copied_operands,
            "aten::bmm": _copied_operands,
            "aten::baddbmm": _copied_operands,
            "aten::sort": _sort,
            "aten::cumsum": lambda args, kwargs, out: [SCAN_BYTES] if args[0].dim() == 1 else [],
        }
    )
    recorder.workspaces_before["aten::_foreach_norm"] = _foreach_norm
    handles = _CublasHandles(target)
    for name in ("aten::mm", "aten::bmm", "aten::baddbmm", "aten::addmm", "aten::_grouped_mm"):
        recorder.handles[name] = handles.used_by(name)
    yield


class _CublasHandles:
    """A cuBLAS handle takes its workspace at its first GEMM and keeps it; each thread has its own handles.

    The autograd engine runs backward in a thread of its own. A GEMM with a bias goes through cuBLASLt, whose
    handle is the cuBLAS handle of the thread: first its own workspace is made, then that one's.
    """

    def __init__(self, target: CudaTarget) -> None:
        hopper = target.compute_capability[0] == 9
        self._cublas_bytes = CUBLAS_WORKSPACE_HOPPER_BYTES if hopper else CUBLAS_WORKSPACE_BYTES
        self._seen: set[tuple[bool, bool]] = set()

    def used_by(self, name: str) -> Any:
        light = name == "aten::addmm"

        def use(recorder: Recorder, args: tuple[Any, ...]) -> None:
            backward = recorder.phase.name == "backward"
            wanted = [(False, self._cublas_bytes)]
            if light:
                wanted.insert(0, (True, CUBLASLT_WORKSPACE_BYTES))
            for kind, size_bytes in wanted:
                if (kind, backward) not in self._seen:
                    self._seen.add((kind, backward))
                    recorder.allocate(size_bytes, "cublas_workspace", Category.WORKSPACES)

        return use


def _cudnn_attention_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[int]:
    """fp32 accumulator of dQ, row sums, and dK, dV of every query head where heads are grouped.

    From the H100 histories: cuDNN 9.x, head_dim 64 and 128.
    """
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    size_bytes = batch * heads * length * (head_dim + 1) * 4 + 256
    if key.shape[1] != heads:
        size_bytes += 2 * batch * heads * length * head_dim * query.element_size()
    return [size_bytes]


def _flash_attention_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[int]:
    """softmax_d, dq_accum, and expanded dK, dV (mha_bwd in flash_attn/flash_api.cpp), lengths rounded to 128."""
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    rounded = -(-length // 128) * 128
    step = 32 if head_dim <= 128 else 64
    head_rounded = -(-head_dim // step) * step
    sizes = [batch * heads * rounded * 4, batch * heads * rounded * head_rounded * 4]
    if key.shape[1] != heads:
        sizes += [batch * key.shape[2] * heads * head_dim * query.element_size()] * 2
    return sizes


def _efficient_attention_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[int]:
    """delta, and the fp32 accumulator of dQ (attention_backward.cu)."""
    batch, heads, length, head_dim = args[1].shape
    return [batch * heads * length * 4, batch * heads * length * head_dim * 4]


def _copied_operands(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[int]:
    """Matrices that BLAS can't read where they lie are copied first (prepare_matrix_for_cublas, Blas.cpp)."""
    matrices = [t for t in args[-2:] if isinstance(t, torch.Tensor)]
    return [t.numel() * t.element_size() for t in matrices if not _readable(t)]


def _readable(matrix: torch.Tensor) -> bool:
    rows, columns = matrix.shape[-2:]
    down, along = matrix.stride()[-2:]
    if (down == 1 and along >= max(1, rows)) or (along == 1 and down >= max(1, columns)):
        return True
    return bool(matrix.is_contiguous()) and down != 0 and along != 0


def _converted_input(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[int]:
    """A sum of booleans or small integers is made on a copy of the input in the type of the result.

    Only half types are widened within the kernel (make_reduction, ATen/native/ReduceOpsUtils.h).
    """
    source = args[0]
    if source.dtype == out.dtype or source.is_floating_point():
        return []
    return [source.numel() * out.element_size()]


def _sort(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[int]:
    keys = args[0]
    if keys.dim() != 1:
        return []
    count = keys.numel()
    if count <= SMALL_SORT:
        return [count * 8]
    return [count * 8, radix_sort_bytes(count, keys.element_size(), keys.element_size() * 8)]


def radix_sort_bytes(count: int, key_bytes: int, key_bits: int) -> int:
    """Temporary storage of cub::DeviceRadixSort over pairs of a key and an 8-byte index.

    A second buffer for both, a histogram of 256 bins of 8 bytes a pass of 8 bits, and counters. Fits 150,016
    and 137,728 bytes at 8,192 pairs (64 and 14 bits) in the allocator history of an H100.
    """
    if count <= SORT_TILE:
        return 1
    passes = -(-key_bits // 8)
    return count * (key_bytes + 8) + passes * 256 * 8 + -(-count // 4096) * 1024 + 512


def _foreach_norm(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[int]:
    """A partial norm a chunk, as many for each tensor as for the largest (ForeachReduceOp.cu)."""
    tensors = args[0]
    chunks = max((-(-t.numel() // FOREACH_CHUNK) for t in tensors), default=0)
    width = 8 if any(t.dtype == torch.float64 for t in tensors) else 4
    return [len(tensors) * chunks * width]


def _embedding_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[int]:
    """Sorted indices and partial sums of segments of equal indices, above 3072 indices."""
    indices, weights = args[1], args[2]
    count = indices.numel()
    if count <= SORTED_EMBEDDING_ROWS:
        return []
    index_bytes = indices.element_size()
    segments = min(count, weights)
    partials = count // _ROWS_PER_SEGMENT + segments
    sizes = [count * index_bytes] * 2 + [segments * index_bytes] * 3 + [partials * index_bytes]
    return [
        *sizes,
        partials
        * out.shape[-1]
        * (4 if out.dtype in (torch.bfloat16, torch.float16) else out.element_size()),
    ]
