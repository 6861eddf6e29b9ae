"""CUDA's autocast rules on meta tensors.

Which operator runs in which precision is read from the macros of ATen/autocast_mode.h, which ships in the
installed wheel, so that the rules are those of the user's own torch. The kernels are registered under the
CPU's autocast key, which meta tensors may carry and CUDA tensors don't use.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.library import Library

from memplan.trace.as_cuda.patching import patches

_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_POLICIES = {
    "lower": "AT_FORALL_LOWER_PRECISION_FP",
    "fp32": "AT_FORALL_FP32",
    "fp32_set_dtype": "AT_FORALL_FP32_SET_OPT_DTYPE",
    "promote": "AT_FORALL_PROMOTE",
}


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Register the kernels; an autocast region of the CPU then follows CUDA's rules for meta tensors."""
    rules = _Rules()
    library = Library("aten", "IMPL")
    clear = torch.clear_autocast_cache

    def clear_cache() -> Any:
        rules.cache.clear()
        return clear()

    try:
        with warnings.catch_warnings(), patches() as patch:
            warnings.simplefilter("ignore")
            for name, policy in operators().items():
                base, _, overload = name.partition(".")
                op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
                if op is not None:
                    library.impl(name, rules.kernel(op, policy), "AutocastCPU", allow_override=True)
            patch.set(torch, "clear_autocast_cache", clear_cache)
            with torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.AutocastCPU):
                yield
    finally:
        rules.cache.clear()
        library._destroy()


@lru_cache(maxsize=1)
def operators() -> dict[str, str]:
    """Operator (`name` or `name.overload`) → policy, from the header in the installed torch."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    source = header.read_text()
    found: dict[str, str] = {}
    for policy, macro in _POLICIES.items():
        match = re.search(rf"#define {macro}\(_\)\s*\\\n((?:.*\\\n)*.*\n)", source)
        if match is None:
            continue
        for arguments in re.findall(r"_\(([\w, ]+)\)", match[1]):
            name, *overload = [part.strip() for part in arguments.split(",")]
            if overload != ["deprecated"]:
                found[".".join([name, *overload])] = policy
    return found


class _Rules:
    """The casts, and the cache of weights cast once a forward (at::autocast::cached_cast)."""

    def __init__(self) -> None:
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def kernel(self, op: Any, policy: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_KEY):
                args, kwargs = getattr(self, f"_{policy}")(op, args, kwargs)
                return op(*args, **kwargs)

        return run

    def _lower(self, op: Any, args: Any, kwargs: Any) -> Any:
        low = torch.get_autocast_dtype("cpu")
        return self._cast_all(args, kwargs, low, low)

    def _fp32(self, op: Any, args: Any, kwargs: Any) -> Any:
        return self._cast_all(args, kwargs, torch.float32)

    def _fp32_set_dtype(self, op: Any, args: Any, kwargs: Any) -> Any:
        first = args[0] if args else None
        names = [argument.name for argument in op._schema.arguments]
        place = names.index("dtype")
        stated = kwargs.get("dtype") is not None or (len(args) > place and args[place] is not None)
        if (
            not stated
            and first is not None
            and _eligible(first)
            and first.dtype in (torch.bfloat16, torch.float16)
        ):
            return list(args)[:place], {**kwargs, "dtype": torch.float32}
        return args, kwargs

    def _promote(self, op: Any, args: Any, kwargs: Any) -> Any:
        low = torch.get_autocast_dtype("cpu")
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if _eligible(t)]
        widest = torch.float32 if any(t.dtype == torch.float32 for t in tensors) else low
        return self._cast_all(args, kwargs, widest)

    def _cast_all(
        self, args: Any, kwargs: dict[str, Any], dtype: torch.dtype, low: torch.dtype | None = None
    ) -> tuple[list[Any], dict[str, Any]]:
        # The last argument is cast first: the casts are arguments of one C++ call, which GCC evaluates from
        # right to left. An H100's allocator history shows bias, weight, input.
        named = {name: self._cast(kwargs[name], dtype, low) for name in reversed(kwargs)}
        return [self._cast(a, dtype, low) for a in reversed(args)][::-1], named

    def _cast(self, value: Any, dtype: torch.dtype, low: torch.dtype | None = None) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(item, dtype, low) for item in value)
        if not _eligible(value) or value.dtype == dtype:
            return value
        cacheable = (
            dtype == low
            and value.dtype == torch.float32
            and value.requires_grad
            and value.is_leaf
            and value._base is None
            and torch.is_autocast_cache_enabled()
        )
        if not cacheable:
            return value.to(dtype)
        entry = self.cache.get(id(value))
        if entry is None:
            entry = self.cache[id(value)] = (value, value.to(dtype))
        return entry[1]


def _eligible(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "meta"
        and value.is_floating_point()
        and value.dtype != torch.float64
    )
