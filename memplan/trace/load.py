"""Build the model and put its weights on the card, as transformers does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from memplan.errors import ExitCode, MemplanError
from memplan.models.types import ModelFacts
from memplan.names import nearest
from memplan.request.types import Request
from memplan.timeline import Category
from memplan.trace.recorder import Recorder

WARMUP = "caching_allocator_warmup"
"""The loader's first block, as large as the model; a replay bounds it by the card (`memplan.plan.ranks`)."""


def build_config(facts: ModelFacts, *, trust_remote_code: bool = False) -> Any:
    """The `PretrainedConfig` of a model. Raises `MemplanError` for what transformers doesn't take."""
    from transformers import AutoConfig

    fields = dict(facts.config)
    model_type = fields.pop("model_type")
    try:
        if facts.local_dir is not None and fields.get("auto_map") and trust_remote_code:
            return AutoConfig.from_pretrained(facts.local_dir, trust_remote_code=True)
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise MemplanError(
                "config-refused",
                f"transformers refuses the config of `{facts.name}`",
                context=_one_line(error),
                hint="compare its fields with the model's `config.json` on the hub",
            ) from error
        raise _unknown_model_type(facts, model_type) from error
    except Exception as error:
        raise MemplanError(
            "config-refused",
            f"transformers refuses the config of `{facts.name}`",
            context=f"{type(error).__name__}: {_one_line(error)}",
            hint="compare its fields with the model's `config.json` on the hub",
        ) from error


def load_model(request: Request, facts: ModelFacts, recorder: Recorder) -> nn.Module:
    """The model on meta, its weights' births logged in the order in which the loader makes them."""
    if request.use_liger_kernel:
        raise MemplanError(
            "liger-not-traced",
            "memplan can't say what `--use_liger_kernel` takes",
            context="Liger's kernels are Triton code, which allocates out of memplan's sight",
            hint="plan without it: it lowers the peak at the loss, and changes nothing else that is large",
            exit_code=ExitCode.UNKNOWN,
        )
    config = build_config(facts, trust_remote_code=request.trust_remote_code)
    dtype = getattr(torch, str(request.dtype))
    recorder.enter_phase("load", -1)
    with _can_be_built(facts):
        if request.load == "from_config":
            model = _from_config(config, dtype, request)
        else:
            with recorder.paused(), _no_weight_init():
                model = _from_config(config, dtype, request)
    if request.load != "from_config":
        _load_weights(model, dtype, request, recorder)
    model.config.use_cache = False
    attention = getattr(model.config, "_attn_implementation", None)
    if attention != request.attn_implementation:
        recorder.notes[f"transformers chooses `{attention}` attention for this architecture"] = None
    _label(model, recorder)
    return model


def _from_config(config: Any, dtype: torch.dtype, request: Request) -> Any:
    from transformers import AutoModelForCausalLM

    origin = request.origins.get("attn_implementation")
    stated = origin is None or origin.stated
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=request.attn_implementation if stated else None,
            trust_remote_code=request.trust_remote_code,
        )


@contextlib.contextmanager
def _no_weight_init() -> Iterator[None]:
    from transformers import initialization

    with initialization.no_init_weights():
        yield


def _load_weights(model: Any, dtype: torch.dtype, request: Request, recorder: Recorder) -> None:
    """Run the loader's own loop over a checkpoint whose tensors have shapes and no data."""
    from transformers import modeling_utils
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    stored = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    quantizer = _quantizer(request)
    device_map: dict[str, Any] = {"": torch.device("meta")}
    if quantizer is not None:
        with recorder.paused(), _default_dtype(dtype):
            quantizer.preprocess_model(
                model=model, dtype=dtype, device_map=device_map, checkpoint_files=None, use_kernels=False
            )
    _warm_up(model, recorder, quantizer)
    config = modeling_utils.LoadStateDictConfig(
        device_map=device_map,
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        hf_quantizer=quantizer,
        weight_mapping=get_model_conversion_mapping(model, None, quantizer),
    )
    checkpoint = {name: _Stored(*what) for name, what in stored.items() if name not in tied}
    with _sequential_loading(), _no_progress():
        convert_and_load_state_dict_in_model(model=model, state_dict=checkpoint, load_config=config)
    model.tie_weights()
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)


class _Stored:
    """A tensor in a checkpoint file, as safetensors' lazy slices show it: it has no memory until it is moved."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, _: Any) -> _Stored:
        return self

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def is_floating_point(self) -> bool:
        return bool(self.dtype.is_floating_point)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def _quantizer(request: Request) -> Any:
    if not request.is_quantized:
        return None
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    if request.load_in_8bit:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=request.bnb_4bit_quant_type or "fp4",
            bnb_4bit_compute_dtype=request.bnb_4bit_compute_dtype,
            bnb_4bit_use_double_quant=bool(request.use_bnb_nested_quant),
            bnb_4bit_quant_storage=request.bnb_4bit_quant_storage,
        )
    return AutoHfQuantizer.from_config(config, pre_quantized=False)


def _warm_up(model: Any, recorder: Recorder, quantizer: Any) -> None:
    """One block as large as the model, freed at once, so that loading needs no more."""
    from transformers.modeling_utils import expand_device_map, get_total_byte_count

    names = list(model.state_dict())
    where = {name: torch.device("cuda", 0) for name in expand_device_map({"": 0}, names)}
    with recorder.paused():
        byte_count = sum(get_total_byte_count(model, where, quantizer).values())
    size_bytes = int(byte_count // 2) * 2
    recorder.release(recorder.allocate(size_bytes, WARMUP, Category.TEMPORARIES), size_bytes)


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # from_pretrained replaces layers in the context that it builds the model in
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _sequential_loading() -> Iterator[None]:
    # A pool of threads loads plain checkpoints; a dispatch mode sees its own thread only.
    name, before = "HF_DEACTIVATE_ASYNC_LOAD", os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _label(model: nn.Module, recorder: Recorder) -> None:
    for parameter in model.parameters():
        recorder.label(parameter.data, Category.PARAMETERS)
        state = getattr(parameter, "quant_state", None)
        for owner in (state, getattr(state, "state2", None)):
            for tensor in vars(owner).values() if owner is not None else ():
                if isinstance(tensor, torch.Tensor):
                    recorder.label(tensor, Category.PARAMETERS)
    for module in model.modules():
        statistics = getattr(getattr(module, "weight", None), "SCB", None)
        if isinstance(statistics, torch.Tensor):
            recorder.label(statistics, Category.PARAMETERS)
    for buffer in model.buffers():
        recorder.label(buffer, Category.BUFFERS)


@contextlib.contextmanager
def _can_be_built(facts: ModelFacts) -> Iterator[None]:
    try:
        yield
    except MemplanError:
        raise
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise MemplanError(
                "model-has-no-head",
                f"`{facts.name}` has no causal language model in transformers",
                context=f"its model_type is `{facts.config.get('model_type')}`",
                hint="memplan check plans causal language models",
                exit_code=ExitCode.UNKNOWN,
            ) from error
        raise MemplanError(
            "model-refuses",
            f"transformers refuses to build `{facts.name}` this way",
            context=_one_line(error),
            hint="another `--attn_implementation` may do, such as `eager`",
        ) from error
    except ImportError as error:
        raise MemplanError(
            "package-missing",
            f"transformers needs a package that is not installed here to build `{facts.name}` this way",
            context=_one_line(error),
            hint="install it, or choose another `--attn_implementation`, such as `sdpa`",
            exit_code=ExitCode.UNKNOWN,
        ) from error
    except (RuntimeError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise MemplanError(
            "model-not-built",
            f"transformers can't build `{facts.name}` from its config",
            context=f"{type(error).__name__}: {_one_line(error)}",
            hint="compare its fields with the model's `config.json` on the hub",
        ) from error


def _unknown_model_type(facts: ModelFacts, model_type: str) -> MemplanError:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    near = nearest(model_type, CONFIG_MAPPING_NAMES, 3)
    hint = (
        "near names: " + ", ".join(f"`{name}`" for name in near)
        if near
        else "a newer transformers may know it"
    )
    return MemplanError(
        "unknown-model-type",
        f"the config of `{facts.name}` has model_type `{model_type}`",
        context=f"transformers {transformers.__version__} has no such architecture",
        hint=hint,
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
