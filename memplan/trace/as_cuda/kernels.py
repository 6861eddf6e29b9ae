"""Operators whose meta implementation allocates otherwise than their CUDA kernel, or refuses what CUDA takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from memplan.trace.as_cuda.patching import patches
from memplan.trace.as_cuda.target import CudaTarget
from memplan.trace.as_cuda.workspaces import radix_sort_bytes
from memplan.trace.recorder import Recorder


@contextlib.contextmanager
def installed(target: CudaTarget, recorder: Recorder) -> Iterator[None]:
    """Put the kernels in the recorder, and CUDA's dropout in place of the composite one."""
    recorder.kernels["aten::_grouped_mm"] = _grouped_mm
    recorder.kernels["aten::index_put"] = _index_put(recorder)
    if target.compute_capability[0] in (9, 10):
        recorder.kernels["aten::_grouped_mm"] = _with_group_buffers(target, recorder)
    with patches() as patch:
        patch.set(F, "dropout", _dropout)
        recorder.output_order["aten::native_dropout"] = (1, 0)  # the mask first (dropout_cuda, Dropout.cu)
        yield


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    # at::dropout takes the fused kernel, which keeps a mask of bytes, only for CUDA tensors
    # (ATen/native/Dropout.cpp, is_fused_kernel_acceptable).
    if not training or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input * 0
    return torch.native_dropout(input, p, True)[0]


def _index_put(recorder: Recorder) -> Any:
    """The backward of indexing adds into fresh zeros in place on CUDA, out of place under a dispatch mode.

    torch/csrc/autograd/FunctionsManual.cpp, index_backward. The kernel sorts the indices
    (ATen/native/cuda/Indexing.cu, index_put_with_sort_kernel): five arrays of them and the sort's storage.
    """

    def index_put(
        values_into: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False
    ) -> Any:
        if not (recorder.attribution.in_backward and accumulate and not torch.is_grad_enabled()):
            with torch.utils._python_dispatch._disable_current_modes():
                out = torch.ops.aten.index_put.default(values_into, indices, values, accumulate)
            recorder.track(out, "aten::index_put")
            return out
        count = max((i.numel() for i in indices if i is not None), default=0)
        bits = max((values_into.shape[0] - 1).bit_length(), 1)
        sizes = [count * 8] * 5 + [radix_sort_bytes(count, 8, bits)]
        recorder.use(sizes, "aten::index_put")
        return values_into

    return index_put


def _with_group_buffers(target: CudaTarget, recorder: Recorder) -> Any:
    """CUTLASS's grouped GEMM of Hopper and later: addresses and strides a group, tensor maps a multiprocessor.

    ATen/native/cuda/GroupMM.cu. In the allocator history of an H100 with 32 groups: 2,048 and 67,584 bytes.
    """

    def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        out = _grouped_mm(a, b, offs, **kwargs)
        if a.dtype == torch.bfloat16:
            groups = offs.shape[0] if offs is not None else a.shape[0]
            recorder.use([groups * 60, target.multiprocessor_count * 512], "aten::_grouped_mm")
        return out

    return grouped_mm


def _grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    # The meta kernel takes bfloat16 only; CUDA falls back to a loop for other types.
    kind: dict[str, Any] = {"dtype": out_dtype or a.dtype, "device": a.device}
    if a.dim() == 2 and b.dim() == 3:
        return torch.empty(a.shape[0], b.shape[2], **kind)
    if a.dim() == 2 and offs is not None:
        return torch.empty(offs.shape[0], a.shape[0], b.shape[1], **kind)
    if a.dim() == 3 and b.dim() == 2:
        return torch.empty(a.shape[1], b.shape[1], **kind)
    return torch.empty(a.shape[0], a.shape[1], b.shape[2], **kind)
