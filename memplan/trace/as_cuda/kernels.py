"""Operators whose meta implementation allocates otherwise than their CUDA kernel, or refuses what CUDA takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from memplan.trace.as_cuda.patching import patches
from memplan.trace.as_cuda.target import CudaTarget
from memplan.trace.recorder import Recorder


@contextlib.contextmanager
def installed(target: CudaTarget, recorder: Recorder) -> Iterator[None]:
    """Put the kernels in the recorder, and CUDA's dropout in place of the composite one."""
    recorder.kernels["aten::_grouped_mm"] = _grouped_mm
    with patches() as patch:
        patch.set(F, "dropout", _dropout)
        yield


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    # at::dropout takes the fused kernel, which keeps a mask of bytes, only for CUDA tensors
    # (ATen/native/Dropout.cpp, is_fused_kernel_acceptable).
    if not training or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input * 0
    return torch.native_dropout(input, p, True)[0]


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
