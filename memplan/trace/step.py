"""The training job as `Trainer` runs it: prepare, then forward, backward, clip, step, zero_grad.

Follows transformers/trainer.py (`_inner_training_loop`, `_run_epoch`, `training_step`, `compute_loss`,
`get_batch_samples`) and accelerate/accelerator.py (`prepare_model`), 5.17.0 and 1.15.0. What they keep in a
local variable is kept here as long, since that is how long its memory lives.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.request.types import Request
from memplan.timeline import Category
from memplan.trace.depth import Depth, shortened
from memplan.trace.extend import Skipped
from memplan.trace.optimizers import make_optimizer
from memplan.trace.recorder import Recorder

Wrap = Callable[[nn.Module], nn.Module]

PADDED_SHARE = 0.3
"""With `padding="right"` all samples of a batch but the first end in this share of padding."""


def prepare_model(model: Any, request: Request, recorder: Recorder) -> nn.Module:
    """What the user's script does before it hands the model to `Trainer`: PEFT's preparation and adapters."""
    recorder.enter_phase("prepare", -1)
    if request.prepare_model_for_kbit_training:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=bool(request.gradient_checkpointing)
        )
        recorder.empty_cache()
    if not request.use_peft:
        return model
    model = _add_adapters(model, request, recorder)
    if request.gradient_checkpointing:
        model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            recorder.label(parameter.data, Category.ADAPTERS)
        elif recorder.labelled(parameter.data) is not None:
            recorder.label(parameter.data, Category.PARAMETERS)
    return model


def _add_adapters(model: Any, request: Request, recorder: Recorder) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = request.lora_target_modules
    config = LoraConfig(
        r=request.lora_r or 8,
        lora_alpha=request.lora_alpha or 8,
        lora_dropout=request.lora_dropout or 0.0,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        task_type="CAUSAL_LM",
    )
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    try:
        with recorder.paused(), torch.device("meta"):
            return get_peft_model(model, config)
    except ValueError as error:
        raise MemplanError(
            "lora-targets-unmatched",
            f"PEFT finds nothing to adapt for `--lora_target_modules {_as_typed(targets)}`",
            context=" ".join(str(error).split()),
            hint="this model's linear layers: " + ", ".join(f"`{name}`" for name in linear),
        ) from error


def _as_typed(targets: str | tuple[str, ...] | None) -> str:
    return targets if isinstance(targets, str) else " ".join(targets or ("(PEFT's default)",))


def begin_training(model: Any, request: Request, recorder: Recorder, wrap: Wrap | None) -> nn.Module:
    """What `Trainer.train` does before the first step: checkpointing, autocast, the parallel wrapper."""
    recorder.empty_cache()  # Accelerator.free_memory
    model.train()
    if request.gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": bool(request.use_reentrant)}
        )
    low = torch.bfloat16 if request.bf16 else torch.float16 if request.fp16 else None
    if low is not None:
        from accelerate.utils import convert_outputs_to_fp32

        autocast = torch.autocast("cuda", dtype=low)
        model.forward = types.MethodType(autocast(model.forward.__func__), model)
        model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    return wrap(model) if wrap is not None else model


class Steps:
    """Optimizer steps, one after the other, on a wrapped model."""

    def __init__(
        self,
        model: nn.Module,
        inner: Any,
        request: Request,
        recorder: Recorder,
        depth: Depth | None,
        skipped: Skipped,
    ) -> None:
        self._model, self._request, self._recorder = model, request, recorder
        self._depth, self._skipped = depth, skipped
        self._named = _parameters_by_layer(inner, depth)
        for layer, name, parameter in self._named:
            storage = recorder.labelled(parameter)
            if storage is not None:
                skipped.parameters[storage] = (layer, name)
        self._optimizer = make_optimizer(inner, request)
        self._scale_loss = (request.num_processes or 1) > 1
        forward = inspect.signature(_unwrap(inner).forward).parameters.values()
        self._counts_items = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in forward)
        self._names = {p.name for p in forward}
        self._total_loss = torch.zeros((), device="meta")
        self._batches: list[dict[str, torch.Tensor]] = []
        self._item_count: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None

    def run(self, step: int) -> None:
        """One optimizer step over its micro-batches."""
        recorder, request = self._recorder, self._request
        recorder.enter_phase("data", step)
        self._fetch()
        for index, batch in enumerate(self._batches):
            last = index == len(self._batches) - 1
            synchronize = last or not hasattr(self._model, "no_sync")
            if synchronize:
                loss = self._micro_batch(batch, step)
            else:
                with self._model.no_sync():
                    loss = self._micro_batch(batch, step)
            torch.isnan(loss)
            torch.isinf(loss)
            self._total_loss += loss
            del loss
        self._number_gradients(step)
        recorder.enter_phase("clip", step)
        bound = request.max_grad_norm if request.max_grad_norm else float("inf")
        self._norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), bound)
        recorder.enter_phase("optimizer", step)
        self._optimizer.step()
        recorder.enter_phase("zero_grad", step)
        self._model.zero_grad()

    def _number_gradients(self, step: int) -> None:
        """Tell which storage holds whose gradient; those of skipped layers get their number here."""
        for layer, name, parameter in self._named:
            if parameter.grad is None:
                continue
            storage = self._recorder.labelled(parameter.grad)
            if storage is None:
                storage = self._recorder.adopt(parameter.grad)
            self._skipped.gradients[storage] = (step, layer, name)

    def _fetch(self) -> None:
        fresh = [self._batch() for _ in range(self._request.gradient_accumulation_steps or 1)]
        self._batches = fresh
        if self._counts_items:
            counts = [batch["labels"][..., 1:].ne(-100).sum() for batch in fresh]
            self._item_count = sum(counts[1:], 0 + counts[0])

    def _batch(self) -> dict[str, torch.Tensor]:
        request = self._request
        batch_size, length = request.per_device_train_batch_size or 1, request.max_length or 1
        ids = torch.ones(batch_size, length, dtype=torch.long)
        mask = torch.ones_like(ids)
        if request.padding == "right":
            mask[1:, int(length * (1 - PADDED_SHARE)) :] = 0
        batch = {"input_ids": ids * mask, "labels": torch.where(mask.bool(), ids, -100)}
        if request.attention_mask and "attention_mask" in self._names:
            batch["attention_mask"] = mask
        return {name: tensor.to("meta") for name, tensor in batch.items()}

    def _micro_batch(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        with shortened(self._depth, self._recorder):
            self._recorder.enter_phase("forward", step)
            loss = self._compute_loss(batch)
            self._recorder.enter_phase("backward", step)
            if not self._counts_items:
                loss = loss / len(self._batches)
            scaled = loss / 1  # Accelerator.backward, whose own accumulation is off
            scaled.backward()
            del scaled
        return loss.detach()

    def _compute_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs: dict[str, Any] = dict(batch)
        if self._counts_items:
            inputs["num_items_in_batch"] = self._item_count
        outputs = self._model(**inputs)
        loss: torch.Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        if self._counts_items and self._scale_loss:
            loss *= self._request.num_processes
        return loss


def _parameters_by_layer(model: nn.Module, depth: Depth | None) -> list[tuple[int, str, nn.Parameter]]:
    if depth is None:
        return []
    layers = getattr(depth.owner, depth.name)
    return [(i, name, p) for i, layer in enumerate(layers) for name, p in layer.named_parameters()]


def _unwrap(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logits_modules(model: Any, names: list[str]) -> list[str]:
    """The modules whose own operators make logits and loss: the head, and what holds head and body."""
    base = _unwrap(model)
    prefix = next((n for n, m in model.named_modules() if m is base), "")
    head = base.get_output_embeddings()
    head_name = next((n for n, m in base.named_modules() if m is head), None) if head is not None else None
    outer = {""} | {".".join(prefix.split(".")[: i + 1]) for i in range(prefix.count(".") + 1)}
    full_head = None if head_name is None else f"{prefix}.{head_name}" if prefix else head_name
    return [
        name
        for name in names
        if name in outer
        or (full_head is not None and (name == full_head or name.startswith(full_head + ".")))
    ]
