"""What to change: for this cause and phase, in the options of the tool that the traceback shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.diagnosis.types import Advice, Cause, Figures, Finding, Kind, Phase
from memplan.units import format_bytes

_TRAINERS = frozenset(
    {
        "transformers",
        "trl",
        "accelerate",
        "deepspeed",
        "axolotl",
        "llamafactory",
        "deepke",
        "unsloth",
        "peft",
        "pytorch",
    }
)
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "4bit": {
        "transformers": "`quantization_config=BitsAndBytesConfig(load_in_4bit=True)`",
        "trl": "`--load_in_4bit --use_peft`",
        "axolotl": "`load_in_4bit: true` and `adapter: qlora`",
        "llamafactory": "`quantization_bit: 4` with `finetuning_type: lora`",
        "deepke": "`--bits 4`",
        "unsloth": "`load_in_4bit=True` of `FastLanguageModel.from_pretrained`",
    },
    "checkpoint": {
        "transformers": "`--gradient_checkpointing`",
        "axolotl": "`gradient_checkpointing: true`",
        "llamafactory": "`disable_gradient_checkpointing: false`",
        "unsloth": '`use_gradient_checkpointing="unsloth"`',
        "pytorch-lightning": "`torch.utils.checkpoint.checkpoint` around each block",
        "pytorch": "`torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)`",
        "deepspeed": "`activation_checkpointing` in ds_config",
    },
    "batch": {
        "transformers": "`--per_device_train_batch_size` halved and `--gradient_accumulation_steps` doubled",
        "axolotl": "`micro_batch_size` halved and `gradient_accumulation_steps` doubled",
        "llamafactory": "`per_device_train_batch_size` halved and `gradient_accumulation_steps` doubled",
        "deepspeed": "`train_micro_batch_size_per_gpu` halved and `gradient_accumulation_steps` doubled",
        "pytorch": "half the batch, and gradients of two batches accumulated before each step",
    },
    "length": {
        "transformers": "a shorter `--max_length` (TRL) or `max_length` of the tokenizer",
        "trl": "a lower `--max_length`",
        "axolotl": "a lower `sequence_len`",
        "llamafactory": "a lower `cutoff_len`",
        "deepke": "a lower `--cutoff_len`",
        "unsloth": "a lower `max_seq_length`",
        "pytorch": "shorter or smaller inputs",
    },
    "optimizer": {
        "transformers": "`--optim adamw_bnb_8bit` or `--optim paged_adamw_8bit`",
        "axolotl": "`optimizer: adamw_bnb_8bit` or `paged_adamw_8bit`",
        "llamafactory": "`optim: adamw_bnb_8bit` or `paged_adamw_8bit`",
        "deepspeed": "`offload_optimizer: {device: cpu}` under `zero_optimization`",
        "pytorch": "`bitsandbytes.optim.AdamW8bit` or `PagedAdamW8bit`",
    },
    "lora": {
        "transformers": "LoRA through PEFT: `get_peft_model(model, LoraConfig(…))`",
        "trl": "`--use_peft`",
        "axolotl": "`adapter: lora`",
        "llamafactory": "`finetuning_type: lora`",
        "pytorch": "LoRA in place of training all weights",
    },
    "shard": {
        "transformers": (
            "FSDP (`--fsdp full_shard`) or ZeRO-3 (`--deepspeed ds_zero3.json`), which "
            "divide the weights over the cards"
        ),
        "axolotl": "`deepspeed: deepspeed_configs/zero3_bf16.json`",
        "llamafactory": "`deepspeed: examples/deepspeed/ds_z3_config.json`",
        "deepspeed": "`stage: 3` under `zero_optimization`",
        "accelerate": "`accelerate launch --use_fsdp` or `--use_deepspeed --zero_stage 3`",
        "pytorch": "`torch.distributed.fsdp.fully_shard`, which divides the weights over the cards",
    },
    "logits": {
        "transformers": "`--use_liger_kernel`, whose fused loss never holds all logits",
        "axolotl": "`liger_fused_linear_cross_entropy: true` or `cut_cross_entropy: true`",
        "llamafactory": "`enable_liger_kernel: true`",
        "pytorch": "the loss over slices of the sequence, so that not all logits exist at once",
    },
    "eval": {
        "transformers": "`--per_device_eval_batch_size 1 --eval_accumulation_steps 1 --prediction_loss_only`",
        "axolotl": "`eval_batch_size: 1`, and no `eval_table_size`",
        "llamafactory": "`per_device_eval_batch_size: 1`",
        "pytorch": "`torch.inference_mode()`, and results moved to the CPU batch by batch",
    },
}
_HOST_LOAD = (
    "a host with more memory, or fewer processes that load at once: each holds its own copy of the weights"
)


def advice_for(finding: Finding, phase: Phase, cause: Cause) -> tuple[Advice, ...]:
    """Fixes in the order to try them, then what the message or a first thought advises in vain."""
    helps = [Advice(text=text) for text in dict.fromkeys(_fixes(finding, phase, cause))]
    return (*helps, *(Advice(text=text, helps=False) for text in _in_vain(finding, phase, cause)))


def _fixes(finding: Finding, phase: Phase, cause: Cause) -> Iterator[str]:
    kind, tool = finding.kind, finding.framework
    if cause == "other_process" and kind in _BY_KIND:
        yield from _for_the_cause(finding, cause)
    if kind in _BY_KIND:
        yield from _BY_KIND[kind]
        return
    if kind == "host_oom":
        yield from _for_the_host(finding, phase)
        return
    if kind in ("vllm_kv", "sglang_kv") or (tool in ("vllm", "sglang") and cause != "other_process"):
        yield from _for_a_server(finding, cause)
        return
    yield from _for_the_cause(finding, cause)
    if cause in ("capacity", "config", "single_huge_allocation", "fragmentation", "leak"):
        yield from _for_the_phase(tool, phase)
    if cause == "unknown":
        yield (
            "paste the whole message and traceback, and the output of `nvidia-smi` from the moment of "
            "the failure: "
            "this text alone doesn't tell the cause"
        )


def _for_the_cause(finding: Finding, cause: Cause) -> Iterator[str]:
    figures = finding.figures
    if cause == "other_process":
        yield (
            "look with `nvidia-smi` at what else is on the card, and end it or choose another: "
            "`CUDA_VISIBLE_DEVICES=1`"
        )
        if finding.rank:
            yield (
                f"rank {finding.rank} works on {_card(figures)}: give each its own, "
                '`torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))` and `device_map={"": local_rank}`'
            )
    elif cause == "fragmentation" and finding.kind in ("cuda_oom", "hip_oom"):
        yield (
            f"`{_variable(finding)}=expandable_segments:True`: what is cached then serves requests "
            f"of any size"
        )
        yield (
            "keep lengths alike (`--group_by_length`, or padding to a multiple), so that freed "
            "blocks can be used again"
        )
    elif cause == "config" and figures.allowed_bytes is not None:
        yield (
            "raise the cap: `torch.cuda.set_per_process_memory_fraction`, or "
            "`per_process_memory_fraction` in the allocator's settings"
        )
    elif cause == "config":
        yield (
            "look for what makes the size: ranks that wait in different collectives, or a length "
            "read from garbage"
        )
    elif cause == "leak":
        yield (
            "keep no tensor of past steps: `total += loss.item()` in place of `total += loss`, and "
            "outputs moved to the CPU"
        )
    elif cause == "single_huge_allocation":
        yield (
            "find the tensor: the innermost line of your own code in the traceback makes it, from a "
            "batch, a length or a shape that is too large"
        )


def _for_the_phase(tool: str, phase: Phase) -> Iterator[str]:
    if tool not in _TRAINERS and phase not in ("generate", "eval"):
        return
    match phase:
        case "load":
            yield f"fewer bits a weight: {_option('4bit', tool)}"
            yield f"over several cards: {_option('shard', tool)}"
        case "forward" | "backward" | "unknown":
            yield from (_option(name, tool) for name in ("checkpoint", "batch", "length"))
        case "loss":
            yield from (_option(name, tool) for name in ("logits", "batch", "length"))
        case "optimizer":
            yield from (_option(name, tool) for name in ("optimizer", "lora", "shard"))
        case "eval":
            yield _option("eval", tool)
        case "generate":
            yield "fewer or shorter sequences at once: the batch, `max_new_tokens`, the length of the prompt"
            yield '`cache_implementation="offloaded"` of `generate`, which keeps the KV cache on the host'
        case "save":
            yield (
                "save in parts: `SHARDED_STATE_DICT` under FSDP, "
                "`stage3_gather_16bit_weights_on_model_save: false` under ZeRO-3"
            )
            yield "move each tensor to the CPU before it is converted or merged"
        case "data":
            yield (
                "move a batch to the card when its step begins, not when it is collated, and fewer "
                "samples at once"
            )


def _for_the_host(finding: Finding, phase: Phase) -> Iterator[str]:
    if finding.framework in ("kubernetes", "slurm", "lsf", "ray"):
        limits = {
            "kubernetes": "raise `resources.limits.memory` of the pod",
            "slurm": "ask for more: `--mem` or `--mem-per-cpu`",
            "lsf": "ask for more: `bsub -M` and `-R rusage[mem=…]`",
            "ray": "ask for more with `memory=` of the task, or run fewer tasks a node",
        }
        yield limits[finding.framework]
    if finding.framework == "windows":
        yield "let Windows manage the paging file, or make it larger than the model"
    if phase == "load":
        yield _HOST_LOAD
        yield "weights as safetensors, and `device_map` so that they go to the card one by one"
    elif phase == "data":
        yield (
            "fewer `dataloader_num_workers`, and data that is read from disk (memory-mapped) in place of held"
        )
    elif phase == "optimizer":
        yield "less on the host: no optimizer offload, or an 8-bit optimizer on the card"
    elif phase == "save":
        yield "save in shards, by one process"
    else:
        yield (
            "find what grows on the host: `dataloader_num_workers`, offload to the CPU, each "
            "process's own copy of the weights"
        )
    yield "`dmesg -T | grep -i oom` shows whether the kernel ended it, and what else was large"


def _for_a_server(finding: Finding, cause: Cause) -> Iterator[str]:
    f = finding.figures
    if finding.framework == "sglang" or finding.kind == "sglang_kv":
        yield (
            "raise `--mem-fraction-static` where the KV cache is too small, lower it where "
            "activations ran out"
        )
        yield "`--context-length` shorter, `--max-running-requests` fewer"
        return
    if cause == "other_process":
        yield "end what else is on the card, see `nvidia-smi`: an earlier engine often is"
    if f.total_bytes and f.free_bytes is not None and f.requested_bytes:
        yield (
            f"`--gpu-memory-utilization {max(0.05, f.free_bytes / f.total_bytes - 0.02):.2f}`, which "
            f"fits what is free"
        )
    elif cause == "kv_cache":
        yield (
            "`--max-model-len` down to the length that the message says is possible, or a higher "
            "`--gpu-memory-utilization`"
        )
        yield "`--kv-cache-dtype fp8`, which halves the KV cache"
    else:
        yield "a lower `--gpu-memory-utilization`, `--max-num-seqs` and `--max-num-batched-tokens`"
    yield "more cards: `--tensor-parallel-size`"


def _in_vain(finding: Finding, phase: Phase, cause: Cause) -> Iterator[str]:
    said = finding.message.lower()
    cached = finding.figures.cached_bytes
    if cause != "fragmentation" and ("expandable_segments" in said or "max_split_size_mb" in said):
        name = "expandable_segments" if "expandable_segments" in said else "max_split_size_mb"
        if cached is not None and cached < max(finding.figures.requested_bytes or 0, 1):
            much = (
                f"only {format_bytes(cached)} are cached, less than was asked for"
                if cached
                else "nothing is cached"
            )
            yield f"not `{name}`, which the message suggests: {much}"
        elif cause == "other_process":
            yield f"not `{name}`, which the message suggests: the memory is another process's"
    if phase == "load" and cause == "capacity" and finding.framework in _TRAINERS:
        yield "not a smaller batch: no batch has been made yet"
        yield "not more cards by themselves: each process of a data-parallel job loads the whole model"
    if cause == "fragmentation":
        yield "not a larger card first: enough is reserved, in the wrong pieces"
    if finding.kind == "mps_oom" and "high_watermark_ratio" in said:
        yield (
            "not `PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0` as a first step: without the limit the whole "
            "system may stop"
        )
    if "empty_cache" in said and cause in ("capacity", "other_process"):
        yield "not `empty_cache`: the allocator already gives its cache back before it fails"


_BY_KIND: Mapping[Kind, tuple[str, ...]] = {
    "shm": (
        (
            "give the container more shared memory: `docker run --shm-size=16g` or `--ipc=host`; on "
            "Kubernetes an `emptyDir` with `medium: Memory` at /dev/shm"
        ),
        "`dataloader_num_workers` 0, or `torch.multiprocessing.set_sharing_strategy('file_system')`",
    ),
    "load_dispatch": (
        'make the card empty (`nvidia-smi`) and place the model whole, `device_map={"": 0}`',
        (
            "fewer bits or a smaller model, if it is too large for the card: it can't be trained from the "
            "CPU or disk"
        ),
    ),
    "not_oom": ("look for the error itself: the card's memory isn't short, so a smaller batch won't help",),
    "compat": (),
    "nccl_oom": (
        "leave NCCL a part of the card, a GiB or more: a lower memory fraction of the framework's own pool",
        "`NCCL_BUFFSIZE` lower, or fewer communicators (each holds buffers of its own)",
    ),
    "jax_oom": (
        "a smaller batch, or `jax.checkpoint` around the layers",
        (
            "`XLA_PYTHON_CLIENT_MEM_FRACTION=.95` where the pool is smaller than the card, and nothing "
            "else on it"
        ),
    ),
    "tf_oom": (
        "a smaller batch",
        "`tf.config.experimental.set_memory_growth(gpu, True)` where several processes share the card",
    ),
    "cupy_oom": (
        (
            "arrays in pieces or of a smaller type; `cupy.get_default_memory_pool().free_all_blocks()` "
            "between stages"
        ),
    ),
    "ort_oom": (
        (
            "`gpu_mem_limit` and `arena_extend_strategy: kSameAsRequested` of the CUDA provider, and one "
            "session for all requests"
        ),
    ),
    "paddle_oom": (
        "a smaller batch",
        "`FLAGS_fraction_of_gpu_memory_to_use` lower where others share the card",
    ),
    "ggml_oom": (
        "fewer layers on the card: `-ngl`",
        "a shorter context, `-c`, or a smaller KV cache: `--cache-type-k q8_0 --cache-type-v q8_0`",
    ),
    "metal_oom": (
        "a shorter context or a smaller model: the card's working set is part of the host's memory",
    ),
}


def _option(name: str, tool: str) -> str:
    """How the tool writes it; the Trainer's options serve those that build on it."""
    table = _OPTIONS[name]
    builds_on_torch = tool in ("pytorch", "pytorch-lightning", "accelerate", "deepspeed")
    return table.get(tool) or table["pytorch" if builds_on_torch and "pytorch" in table else "transformers"]


def _variable(finding: Finding) -> str:
    """The variable as the message itself names it, else the name that every CUDA torch reads."""
    for name in ("PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if name in finding.message:
            return name
    return "PYTORCH_HIP_ALLOC_CONF" if finding.kind == "hip_oom" else "PYTORCH_CUDA_ALLOC_CONF"


def _card(figures: Figures) -> str:
    return "a card that others use" if figures.gpu is None else f"GPU {figures.gpu}"
