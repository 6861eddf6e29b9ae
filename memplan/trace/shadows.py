"""Real values for the small integer tensors that steer control flow.

Model code asks data-dependent questions: is any token padded, are sequences packed? On meta there is no
data to answer with, so token ids, masks and what is computed from them are carried along as small real
tensors ("shadows"), one a storage. A question about a tensor without a shadow is answered by policy, and
noted where the answer is a guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_any, tree_map_only

if TYPE_CHECKING:
    from memplan.trace.recorder import Recorder

LARGEST_SHADOW = 1 << 20
"""Elements. A batch of token ids has fewer; a mask of every query by every key is left without."""

_SCALAR = "aten::_local_scalar_dense"
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_EMPTY = frozenset({"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"})
# What a question about floats is answered with, by the operator that made the answer: activations hold no
# outliers (`any`), no NaN and no infinity.
_FALSE_OPERATORS = frozenset({"aten::any", "aten::isnan", "aten::isinf"})


class Shadows:
    """Shadow tensors by storage. A shadow is flat and mirrors the whole storage."""

    def __init__(self) -> None:
        self._flat: dict[int, torch.Tensor] = {}
        self._bool_from: dict[int, str] = {}

    def forget(self, key: int) -> None:
        """The storage is gone."""
        self._flat.pop(key, None)
        self._bool_from.pop(key, None)

    def keep(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Let `value` (on the host) be what `tensor` (on meta) holds."""
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = torch.zeros(count, dtype=tensor.dtype)
        flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(value)
        self._flat[tensor.untyped_storage()._cdata] = flat

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What a meta tensor holds, None where that is not known."""
        flat = self._flat.get(tensor.untyped_storage()._cdata)
        if flat is None or flat.dtype != tensor.dtype:
            return None
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def run(self, recorder: Recorder, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator on meta and, where all its inputs have shadows, on those too."""
        if name == _SCALAR and args[0].device.type == "meta":
            return self._scalar(recorder, args[0])
        if func in _COPIES:
            copied = self._copy_between_devices(recorder, func, args, kwargs)
            if copied is not None:
                return copied
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.device.type == "meta":
            if out.dtype is torch.bool:
                self._bool_from[out.untyped_storage()._cdata] = name
            if not out.dtype.is_floating_point and name not in _EMPTY:
                self._follow(func, args, kwargs, out)
            elif func is torch.ops.aten.copy_.default:
                self.forget(out.untyped_storage()._cdata)
        return out

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], out: torch.Tensor) -> None:
        key = out.untyped_storage()._cdata
        if out.numel() > LARGEST_SHADOW or out.numel() == 0:
            self._flat.pop(key, None)
            return
        if func._schema.returns[0].alias_info is not None and not func._schema.returns[0].alias_info.is_write:
            return  # a view: the shadow of its storage serves
        missing = False

        def host(tensor: torch.Tensor) -> torch.Tensor | None:
            nonlocal missing
            if tensor.device.type != "meta":
                return tensor
            shadow = self.of(tensor)
            missing = missing or shadow is None
            return shadow

        real_args, real_kwargs = tree_map_only(torch.Tensor, host, (args, kwargs))
        if missing or tree_any(lambda leaf: isinstance(leaf, torch.Generator), (args, kwargs)):
            self._flat.pop(key, None)
            return
        if real_kwargs.get("device") is not None:
            real_kwargs["device"] = torch.device("cpu")
        try:
            value = func(*real_args, **real_kwargs)
        except (RuntimeError, NotImplementedError, IndexError):
            self._flat.pop(key, None)
            return
        if key not in self._flat:
            self.keep(out, value)

    def _copy_between_devices(self, recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        into = func is torch.ops.aten.copy_.default
        source = args[1] if into else args[0]
        target = args[0].device if into else torch.device(kwargs.get("device") or source.device)
        if source.device.type == target.type:
            return None
        if target.type == "meta":
            out = func(*args, **kwargs)
            if source.numel() <= LARGEST_SHADOW and not into:
                self.keep(out, source.to(out.dtype))
            return out
        value = self.of(source)
        if into:
            if value is not None:
                args[0].copy_(value)
            return args[0]
        dtype = kwargs.get("dtype") or source.dtype
        if value is not None:
            return value.to(dtype)
        if source.numel() <= LARGEST_SHADOW:
            return torch.zeros(source.shape, dtype=dtype)
        host = torch.empty(source.shape, dtype=dtype, device="meta")  # too large to be real
        recorder.ignore(host)
        return host

    def _scalar(self, recorder: Recorder, tensor: torch.Tensor) -> bool | int | float:
        value = self.of(tensor)
        if value is not None:
            return value.item()  # type: ignore[no-any-return]
        if tensor.dtype is torch.bool:
            made_by = self._bool_from.get(tensor.untyped_storage()._cdata, "unknown")
            if made_by not in _FALSE_OPERATORS:
                recorder.notes[f"answered `True` to a question about the data (made by {made_by})"] = None
            return made_by not in _FALSE_OPERATORS
        recorder.notes[f"answered 1 to a question about the data ({tensor.dtype} scalar)"] = None
        return 1.0 if tensor.dtype.is_floating_point else 1
