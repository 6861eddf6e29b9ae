"""One real training run under a memory cap, in a process of its own, as this folder's rows were measured.

A `Trainer` over random tokens for a few steps, from loading on. Quantized models load a checkpoint whose data
is a hole in a sparse file: its shapes count, its values don't.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIGS = json.loads((HERE / "configs.json").read_text())
CHECKPOINTS = Path(tempfile.gettempdir()) / "memplan-checkpoints"
STEPS = 4
_STORED = {"torch.bfloat16": "BF16", "torch.float32": "F32", "torch.bool": "BOOL", "torch.int64": "I64"}


def run(case: dict[str, Any], cap_bytes: int | None, results: Any) -> None:
    """Train, and put what happened on the queue `results`; never raises."""
    began = time.time()
    report: dict[str, Any] = {"cap_bytes": cap_bytes, "status": "error"}
    try:
        if case.get("alloc_conf"):
            os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = case["alloc_conf"]
        import torch

        torch.cuda.init()
        report["total_bytes"] = total = torch.cuda.mem_get_info()[1]
        report["gpu"] = torch.cuda.get_device_name()
        if cap_bytes is not None:
            torch.cuda.set_per_process_memory_fraction(cap_bytes / total)
        report["reached"] = "load"
        _train(_model(case), case, report)
        report["status"] = "ok"
    except Exception as error:
        report["status"] = "oom" if "out of memory" in str(error).lower() else "error"
        report["error"] = str(error)[:700] if report["status"] == "oom" else traceback.format_exc()[-2500:]
    report |= _statistics() | {"seconds": round(time.time() - began, 1)}
    results.put((case["id"], report))


def sparse_checkpoint(name: str) -> str:
    """A directory that `from_pretrained` takes: the model's config, and its bf16 weights as a hole."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = CHECKPOINTS / name
    if (directory / "config.json").exists():
        return str(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    header, offset = {}, 0
    for key, tensor in model.state_dict().items():
        if key in tied:
            continue
        end = offset + tensor.numel() * tensor.element_size()
        stored = {"dtype": _STORED[str(tensor.dtype)], "shape": list(tensor.shape)}
        header[key] = stored | {"data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + offset)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(directory)
    return str(directory)


def needs_checkpoint(case: dict[str, Any]) -> bool:
    """Whether the case loads weights, and does not make them on the card."""
    return case["weights"] in ("nf4", "fp4", "int8") or case.get("load") == "pretrained"


def _model(case: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.float32 if case["weights"] == "fp32" else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": case["attn"]}
    if not needs_checkpoint(case):
        config = AutoConfig.for_model(**CONFIGS[case["model"]])
        with torch.device("cuda", 0):
            model = AutoModelForCausalLM.from_config(config, **options)
    else:
        if case["weights"] == "int8":
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        elif case["weights"] in ("nf4", "fp4"):
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=case["weights"],
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=True,
            )
        directory = sparse_checkpoint(case["model"])
        model = AutoModelForCausalLM.from_pretrained(directory, device_map={"": 0}, **options)
    model.config.use_cache = False
    return _adapted(model, case)


def _adapted(model: Any, case: dict[str, Any]) -> Any:
    if case["weights"] in ("nf4", "fp4", "int8"):
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=case["grad_ckpt"])
    if case["method"] == "full":
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    if case["grad_ckpt"]:
        model.enable_input_require_grads()
    return model


def _train(model: Any, case: dict[str, Any], report: dict[str, Any]) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 4096

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.randint(0, model.config.vocab_size - 1, (case["seq"],))
            return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    class Reached(TrainerCallback):
        """How far the run came, for one that ends in the middle."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report["reached"] = f"step {state.global_step}"

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report["reached"] = f"optimizer of step {state.global_step}"

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=case["batch"],
        max_steps=STEPS,
        bf16=True,
        optim=case["optim"],
        gradient_checkpointing=case["grad_ckpt"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if case["grad_ckpt"] else None,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=Tokens(), callbacks=[Reached()]).train()
    torch.cuda.synchronize()


def _statistics() -> dict[str, Any]:
    """Bytes that torch took at most, and what the process holds of the host."""
    import torch

    status = Path("/proc/self/status").read_text().splitlines()
    host = {line.split(":")[0]: int(line.split()[1]) << 10 for line in status if line.endswith("kB")}
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "host_peak_bytes": host.get("VmHWM"),
        "host_anonymous_bytes": host.get("RssAnon"),
    }
