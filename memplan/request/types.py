"""A request: one training job on given cards, in Hugging Face's own field names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16"]
Trainer = Literal["transformers", "trl"]
Load = Literal["pretrained", "from_config"]
Padding = Literal["none", "right"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a field's value comes from: `stated` by the user, or a default of the tool named in `where`."""

    value: Any
    stated: bool
    where: str


@dataclass(frozen=True, kw_only=True)
class CardSpec:
    """One GPU as far as planning needs it; `total_bytes` is what torch sees of it."""

    name: str
    total_bytes: int
    compute_capability: tuple[int, int] | None = None
    """None where only a size was given; the kernels of an H100 (9, 0) are then assumed, and said so."""
    total_known: Literal["stated", "seen", "estimated", "probed"] = "stated"
    """How `total_bytes` is known: by the user, seen in torch's own output, estimated, or read by NVML."""
    multiprocessor_count: int | None = None
    used_bytes: int = 0
    """Held on the card by other processes now; 0 for a card that is only named."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One training job. A field left at None has not been chosen: `resolve_defaults` chooses it, and says where from.

    Sizes are per device, lengths in tokens. `origins` has one entry a field that moves the answer.
    """

    model: str | Mapping[str, Any]
    """Hub id, local directory, path of a `config.json`, catalogue alias, or the fields of a config."""
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False

    trainer: Trainer = "transformers"
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    max_length: int | None = None
    dtype: Dtype | None = None
    bf16: bool | None = None
    fp16: bool | None = None
    optim: str | None = None
    gradient_checkpointing: bool | None = None
    use_reentrant: bool | None = None
    attn_implementation: str | None = None
    max_grad_norm: float | None = None
    use_liger_kernel: bool | None = None

    use_peft: bool | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    lora_target_modules: str | tuple[str, ...] | None = None

    load_in_4bit: bool | None = None
    load_in_8bit: bool | None = None
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    bnb_4bit_compute_dtype: Dtype | None = None
    bnb_4bit_quant_storage: str | None = None
    use_bnb_nested_quant: bool | None = None
    prepare_model_for_kbit_training: bool | None = None

    load: Load | None = None
    """`pretrained`: `from_pretrained` straight onto the card; `from_config`: random weights made there."""
    padding: Padding | None = None
    """`right`: some sample of each batch is shorter than the longest, as real data is; `none`: all are equal."""
    attention_mask: bool | None = None
    """Whether the collator passes an attention mask (Hugging Face's collators do)."""

    num_processes: int | None = None
    ddp_find_unused_parameters: bool | None = None
    cards: tuple[CardSpec, ...] = ()
    alloc_conf: str | None = None
    """`PYTORCH_ALLOC_CONF` of the run, e.g. `expandable_segments:True`."""

    origins: Mapping[str, Origin] = field(default_factory=dict)

    @property
    def is_quantized(self) -> bool:
        """Whether bitsandbytes converts the linear layers."""
        return bool(self.load_in_4bit or self.load_in_8bit)
