"""Which attention kernel CUDA takes, and what it allocates.

On meta torch computes attention in full (`math`), which keeps a matrix of every query by every key. Here
`scaled_dot_product_attention` chooses as ATen/native/transformers/cuda/sdp_utils.cpp does and calls the
kernel's own operator, whose meta and autograd formulas tell what is kept for backward.
Rules read at https://github.com/pytorch/pytorch/blob/001f694aef6f922b4fdf6d27d59162d27bf3df58/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from memplan.trace.as_cuda.devices import AUTOCAST_DEVICE
from memplan.trace.as_cuda.patching import patches
from memplan.trace.as_cuda.target import CudaTarget
from memplan.trace.recorder import Recorder

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def installed(target: CudaTarget, recorder: Recorder) -> Iterator[None]:
    """Replace `torch.nn.functional.scaled_dot_product_attention`."""
    is_autocast_enabled, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if is_autocast_enabled(AUTOCAST_DEVICE):  # it is on autocast's list of lower precision
            low = autocast_dtype(AUTOCAST_DEVICE)
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(low)
            value, key, query = value.to(low), key.to(low), query.to(low)  # the last argument first
        backend = choose(target, query, key, value, attn_mask, enable_gqa)
        return _RUN[backend](query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    with patches() as patch:
        patch.set(F, "scaled_dot_product_attention", attention)
        recorder.output_order["aten::_scaled_dot_product_cudnn_attention"] = (6, 7, 0, 1)
        yield


def choose(
    target: CudaTarget,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    enable_gqa: bool,
) -> str:
    """The backend for these inputs of shape (batch, heads, length, head_dim): cudnn, flash, efficient or math.

    cuDNN comes first on compute capability 9.0 and 10.x (cuDNN newer than 9.15), flash first elsewhere.
    """
    half, head_dim, value_dim = query.dtype in _HALF, query.shape[-1], value.shape[-1]
    needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
    major, minor = target.compute_capability
    ampere = major >= 8
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    order = ["flash", "efficient", "math"]
    if major in (9, 10):
        order.insert(0, "cudnn")
    for backend in order:
        if backend == "cudnn":
            fits = half and ampere and _cudnn_takes(head_dim, value_dim)
            fits = fits and key.shape[2] != 1 and (same_heads or enable_gqa)
        elif backend == "flash":
            # sm86, sm89 and sm120 have too little shared memory for the backward of large heads.
            small_chip = (major, minor) in ((8, 6), (8, 9), (12, 0), (12, 1))
            fits = half and ampere and mask is None and head_dim == value_dim <= 256
            fits = fits and not (needs_grad and small_chip and head_dim > 192) and (same_heads or enable_gqa)
        elif backend == "efficient":
            alignment = 8 if half else 4
            fits = not (head_dim % alignment or value_dim % alignment) and same_heads
            fits = fits and (query.dtype in _HALF or query.dtype == torch.float32)
        else:
            fits = True
        if fits:
            return backend
    return "math"


def _cudnn_takes(head_dim: int, value_dim: int) -> bool:
    """Up to 128; 256, as an allocator history of gemma-3-1b on an H100 shows (torch 2.11.0+cu130)."""
    if head_dim % 8 or value_dim % 8:
        return False
    return max(head_dim, value_dim) <= 128 or head_dim == value_dim == 256


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as zeros and minus infinities of `dtype`: at::native's convert_boolean_attn_mask."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, aten.scalar_tensor(-float("inf"), dtype=dtype, device=mask.device))


def _needs_logsumexp(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _cudnn(
    q: Any, k: Any, v: Any, mask: Any, dropout: float, causal: bool, scale: Any, gqa: bool
) -> torch.Tensor:
    mask = additive_mask(mask, q.dtype)
    if mask is not None:
        mask = mask.expand(q.shape[0], mask.shape[1], q.shape[2], k.shape[2])
    keep = _needs_logsumexp(q, k, v)
    out = aten._scaled_dot_product_cudnn_attention(q, k, v, mask, keep, dropout, causal, False, scale=scale)
    return out[0]


def _flash(
    q: Any, k: Any, v: Any, mask: Any, dropout: float, causal: bool, scale: Any, gqa: bool
) -> torch.Tensor:
    head_dim = q.shape[-1]
    if scale is None:
        scale = head_dim**-0.5
    if head_dim % 8:
        q, k, v = (F.pad(x, (0, 8 - head_dim % 8)) for x in (q, k, v))
    out = aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal, False, scale=scale)[0]
    return out[..., :head_dim]


def _efficient(
    q: Any, k: Any, v: Any, mask: Any, dropout: float, causal: bool, scale: Any, gqa: bool
) -> torch.Tensor:
    mask = additive_mask(mask, q.dtype)
    if mask is not None:
        length = k.shape[2]
        if length % 8:  # rows are padded to 16 bytes before the mask is expanded
            mask = F.pad(mask, (0, 8 - length % 8))[..., :length]
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], length)
    keep = _needs_logsumexp(q, k, v)
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, keep, dropout, causal, scale=scale)[0]


def _math(
    q: Any, k: Any, v: Any, mask: Any, dropout: float, causal: bool, scale: Any, gqa: bool
) -> torch.Tensor:
    mask = additive_mask(mask, q.dtype)
    return aten._scaled_dot_product_attention_math(
        q, k, v, mask, dropout, causal, None, scale=scale, enable_gqa=gqa
    )[0]


_RUN = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient, "math": _math}
