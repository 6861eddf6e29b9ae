"""The optimizer that `Trainer` would make, by transformers' own table of them."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.request.types import Request

# TrainingArguments' defaults (transformers 5.17.0); none of them changes a size.
_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "optim_args": None,
    "optim_target_modules": None,
    "weight_decay": 0.0,
}
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""`Trainer.get_decay_parameter_names`: these patterns and every LayerNorm get no weight decay."""


def make_optimizer(model: nn.Module, request: Request) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, in Trainer's two groups.

    Raises `MemplanError` where transformers has no such optimizer or it needs a package that is missing.
    """
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
    from transformers.trainer_pt_utils import get_parameter_names
    from transformers.training_args import OptimizerNames

    name = str(request.optim)
    arguments = types.SimpleNamespace(optim=OptimizerNames(name), **_ARGUMENTS)
    context = OptimizerContext(
        args=arguments,
        model=model,
        optimizer_kwargs={"lr": arguments.learning_rate},
        adam_kwargs={
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
        },
        optim_args={},
    )
    try:
        optimizer_class, keywords = _OPTIMIZER_HANDLERS[OptimizerNames(name)](context)
        decay = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in trainable if n in decay], "weight_decay": arguments.weight_decay},
            {"params": [p for n, p in trainable if n not in decay], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer = optimizer_class(groups, **keywords)
    except (ImportError, ValueError, TypeError) as error:
        raise MemplanError(
            "optimizer-unavailable",
            f"transformers can't make the optimizer `{name}` here",
            context=" ".join(str(error).split()),
            hint="install what it names, or choose another `--optim`",
        ) from error
    _keep_embeddings_in_32_bits(model, optimizer_class, keywords)
    return optimizer


def _keep_embeddings_in_32_bits(model: nn.Module, optimizer_class: Any, keywords: dict[str, Any]) -> None:
    if "bitsandbytes" not in str(optimizer_class) or keywords.get("optim_bits") != 8:
        return
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
