"""Out-of-memory texts produced on a real card, each under a cap and in a process of its own.

`python tests/measured/make_oom_texts.py OUT/oom_texts.jsonl` writes one JSON line a text: what the process
left on stderr, with what is known of it by construction. It needs an NVIDIA card, torch, transformers,
accelerate and peft, no network and no weights: models are random, from configs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 1 << 30
SECONDS = 60
AT_ONCE = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to run out, and what is known of its text."""

    run: Callable[[], Any]
    phase: str
    cause: str
    kind: str
    cap: float | None
    env: dict[str, str]
    alone: bool
    launcher: tuple[str, ...]
    label: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(
    phase: str,
    cause: str = "capacity",
    *,
    kind: str = "cuda_oom",
    cap: float | None = 2.0,
    env: dict[str, str] | None = None,
    alone: bool = False,
    launcher: tuple[str, ...] = (),
    **label: Any,
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a case under its function's name; `cap` in GiB, `alone` where the whole card is needed."""

    def register(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES[run.__name__] = Case(
            run=run, phase=phase, cause=cause, kind=kind, cap=cap, env=env or {}, alone=alone,
            launcher=launcher, label=label,
        )  # fmt: skip
        return run

    return register


def floats(gib: float, device: str = "cuda") -> Any:
    import torch

    return torch.empty(int(gib * GIB) // 4, dtype=torch.float32, device=device)


def llama(*, layers: int = 4, hidden: int = 1024, vocab: int = 4096, device: str = "cpu", **more: Any) -> Any:
    """A random causal language model in bfloat16; 4 layers of 1024 are 0.15 GiB, 2048 wide 0.6 GiB."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = more.pop("dtype", torch.bfloat16)
    attention = more.pop("attention", "sdpa")
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=65536,
        tie_word_embeddings=False, **more,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def saved(**more: Any) -> str:
    folder = tempfile.mkdtemp()
    llama(**more).save_pretrained(folder)
    return folder


def tokens(batch: int, length: int, vocab: int = 4096, device: str = "cuda") -> dict[str, Any]:
    import torch

    ids = torch.randint(0, vocab, (batch, length), device=device)
    return {"input_ids": ids, "labels": ids}


def rows(count: int, length: int, vocab: int = 4096) -> list[dict[str, list[int]]]:
    return [{"input_ids": [7] * length, "labels": [7] * length} for _ in range(count)]


def trainer(model: Any, batch: int, length: int, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": batch, "bf16": True, "max_steps": 3,
        "per_device_eval_batch_size": batch, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False,
    } | more  # fmt: skip
    data = rows(4 * batch, length)
    return Trainer(
        model, TrainingArguments(**arguments), train_dataset=data, eval_dataset=data,
        data_collator=default_data_collator,
    )  # fmt: skip


def fake_group(world: int = 2) -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)


# Loading and preparing


@case("load", cap=0.4)
def from_pretrained_device_map() -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(saved(hidden=2048), device_map="cuda")


@case("load", cap=0.9)
def from_pretrained_float32() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(saved(hidden=2048), device_map={"": 0}, dtype=torch.float32)


@case("load", cap=0.5)
def from_config_on_the_card() -> None:
    llama(hidden=2048, layers=8, device="cuda")


@case("load", cap=0.4)
def torch_load_map_location() -> None:
    import torch

    path = tempfile.mkdtemp() + "/model.pt"
    torch.save(llama(hidden=2048).state_dict(), path)
    torch.load(path, map_location="cuda:0")


@case("load", cap=0.4)
def safetensors_load_file() -> None:
    from safetensors.torch import load_file

    load_file(saved(hidden=2048) + "/model.safetensors", device="cuda:0")


@case("load", cap=1.0)
def reference_model_beside_the_policy() -> None:
    policy = llama(hidden=2048, device="cuda")
    reference = llama(hidden=2048, device="cuda")
    print(policy, reference)


@case("load", cap=0.7)
def adapters_of_a_great_rank() -> None:
    from peft import LoraConfig, get_peft_model

    base = llama(hidden=2048, device="cuda")
    get_peft_model(base, LoraConfig(r=2048, target_modules="all-linear", task_type="CAUSAL_LM"))


@case("load", cap=0.4)
def model_to_cuda() -> None:
    llama(hidden=2048).to("cuda")


@case("load", cap=0.4)
def model_cuda() -> None:
    llama(hidden=2048).cuda()


@case("load", cap=0.4)
def accelerate_prepare() -> None:
    from accelerate import Accelerator

    Accelerator().prepare(llama(hidden=2048))


@case("load", cap=0.4)
def trainer_places_the_model() -> None:
    trainer(llama(hidden=2048), 1, 64).train()


@case("load", cap=0.8)
def ddp_wrap() -> None:
    from torch.nn.parallel import DistributedDataParallel

    fake_group()
    DistributedDataParallel(llama(hidden=2048, device="cuda"), device_ids=[0])


@case("load", cap=0.4)
def fsdp_wrap() -> None:
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel

    fake_group()
    FullyShardedDataParallel(llama(hidden=2048), device_id=torch.device("cuda:0"))


@case("load", cap=0.4)
def fsdp2_to_cuda() -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fake_group()
    torch.cuda.set_device(0)
    model = llama(hidden=2048)
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cuda", (2,)))
    fully_shard(model)


# Forward and loss


@case("forward")
def mlp_forward() -> None:
    import torch

    layers = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(8))).cuda()
    layers(torch.randn(32768, 4096, device="cuda"))


@case("forward", "single_huge_allocation")
def eager_attention_long_sequence() -> None:
    llama(attention="eager", device="cuda")(**tokens(1, 8192))


@case("forward")
def causal_lm_forward() -> None:
    llama(layers=24, device="cuda")(**tokens(8, 2048))


@case("forward")
def accelerate_forward() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16")
    model = accelerator.prepare(llama(layers=16))
    for batch in [tokens(8, 2048)] * 2:
        accelerator.backward(model(**batch).loss)


@case("forward")
def trainer_forward() -> None:
    trainer(llama(layers=16), 8, 2048).train()


@case("forward")
def convolution_forward() -> None:
    import torch

    net = torch.nn.Sequential(*(torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(9))).cuda()
    net(torch.randn(8, 64, 512, 512, device="cuda"))


@case("loss")
def causal_lm_logits() -> None:
    llama(vocab=128_000, hidden=512, layers=2, device="cuda")(**tokens(1, 2048))


@case("loss")
def cross_entropy() -> None:
    import torch

    logits = torch.randn(2048, 128_000, device="cuda", requires_grad=True)
    torch.nn.functional.cross_entropy(logits, torch.zeros(2048, dtype=torch.long, device="cuda"))


@case("loss", cap=3.0)
def trainer_loss() -> None:
    trainer(llama(vocab=128_000, hidden=512, layers=2), 2, 2048).train()


@case("loss")
def log_softmax_of_a_custom_loss() -> None:
    model = llama(vocab=128_000, hidden=512, layers=2, device="cuda")

    def compute_loss(batch: Any) -> Any:
        logits = model(input_ids=batch["input_ids"]).logits
        chosen = logits.float().log_softmax(-1).gather(-1, batch["labels"][..., None])
        return -chosen.mean()

    compute_loss(tokens(1, 2048)).backward()


# Backward and optimizer


def step_until(model: Any, batch: Any, optimizer: Any = None, steps: int = 3) -> None:
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


@case("backward", cap=0.9)
def plain_backward() -> None:
    step_until(llama(hidden=2048, device="cuda"), tokens(1, 64))


@case("backward", cap=0.9)
def accelerate_backward() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = accelerator.prepare(llama(hidden=2048))
    accelerator.backward(model(**tokens(1, 64)).loss)


@case("backward", cap=0.9)
def trainer_backward() -> None:
    trainer(llama(hidden=2048), 1, 64).train()


@case("backward", cap=1.2)
def checkpointed_recomputation() -> None:
    trainer(llama(hidden=1024, layers=4), 16, 2048, gradient_checkpointing=True).train()


@case("backward", cap=2.7)
def gradient_of_the_logits() -> None:
    import torch

    weight = torch.randn(128_000, 64, device="cuda", requires_grad=True)
    logits = torch.randn(2048, 64, device="cuda") @ weight.T
    torch.nn.functional.cross_entropy(logits, torch.zeros(2048, dtype=torch.long, device="cuda")).backward()


@case("optimizer", cap=1.6)
def adamw_first_step() -> None:
    import torch

    model = llama(hidden=2048, device="cuda")
    step_until(model, tokens(1, 64), torch.optim.AdamW(model.parameters()))


@case("optimizer", cap=1.6)
def adamw_fused() -> None:
    import torch

    model = llama(hidden=2048, device="cuda")
    step_until(model, tokens(1, 64), torch.optim.AdamW(model.parameters(), fused=True))


@case("optimizer", cap=1.5)
def sgd_momentum() -> None:
    import torch

    model = llama(hidden=2048, device="cuda")
    step_until(model, tokens(1, 64), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


@case("optimizer", cap=1.7)
def trainer_optimizer() -> None:
    trainer(llama(hidden=2048), 1, 64).train()


@case("optimizer", cap=1.7)
def accelerate_optimizer() -> None:
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = llama(hidden=2048)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(**tokens(1, 64)).loss)
    optimizer.step()


# Evaluation, generation, saving, data


@case("eval", cap=3.0)
def trainer_evaluate() -> None:
    trainer(llama(vocab=64_000, hidden=512, layers=2), 4, 2048).evaluate()


@case("eval", cap=1.5)
def trainer_evaluates_while_training() -> None:
    task = trainer(
        llama(hidden=512, layers=2), 1, 32, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=64
    )
    task.eval_dataset = rows(64, 4096)
    task.train()


@case("eval", "leak", cap=1.5)
def evaluation_keeps_every_logit() -> None:
    import torch

    model = llama(hidden=512, layers=2, vocab=32_000, device="cuda").eval()
    outputs = []

    @torch.no_grad()
    def evaluate(batches: int) -> None:
        for _ in range(batches):
            outputs.append(model(**tokens(1, 1024)).logits)

    evaluate(100)


@case("generate", cap=0.8)
def generate_prefill() -> None:
    model = llama(layers=4, device="cuda")
    model.generate(tokens(32, 4096)["input_ids"], max_new_tokens=8, do_sample=False)


@case("generate", cap=0.9)
def generate_grows_its_cache() -> None:
    model = llama(layers=4, hidden=1024, device="cuda")
    model.generate(tokens(64, 256)["input_ids"], max_new_tokens=900, min_new_tokens=900, do_sample=False)


@case("generate", cap=0.8)
def generate_static_cache() -> None:
    model = llama(layers=4, hidden=1024, device="cuda")
    model.generate(tokens(64, 16)["input_ids"], max_new_tokens=4096, cache_implementation="static")


@case("save", cap=0.9)
def save_a_float32_copy() -> None:
    import torch

    model = llama(hidden=2048, device="cuda")

    def save_checkpoint(path: str) -> None:
        torch.save({name: tensor.float() for name, tensor in model.state_dict().items()}, path)

    save_checkpoint(tempfile.mkdtemp() + "/model.pt")


@case("save", cap=0.9)
def fsdp_full_state_dict() -> None:
    import torch
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    fake_group()
    model = FullyShardedDataParallel(llama(hidden=2048), device_id=torch.device("cuda:0"))
    settings = FullStateDictConfig(offload_to_cpu=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, settings):
        held = floats(0.2)
        model.state_dict()
        print(held)


@case("save", cap=0.75)
def merge_adapters_before_saving() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        llama(hidden=2048, device="cuda"), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    held = floats(0.11)
    model.merge_and_unload().save_pretrained(tempfile.mkdtemp())
    print(held)


@case("data", "single_huge_allocation")
def batch_to_cuda() -> None:
    for batch in [floats(3.0, "cpu")]:
        batch.to("cuda")


@case("data", "single_huge_allocation", cap=0.5)
def trainer_moves_the_batch() -> None:
    import torch

    task = trainer(llama(layers=1, hidden=256), 1, 32)
    task.data_collator = lambda features: {"input_ids": torch.zeros(1, 64 << 20, dtype=torch.long)}
    task.train()


@case("data")
def collate_on_the_card() -> None:
    import torch
    from torch.utils.data import DataLoader

    def collate(samples: list[Any]) -> Any:
        return torch.stack([sample.to("cuda") for sample in samples])

    for _ in DataLoader(torch.zeros(16, 64 << 20), batch_size=8, collate_fn=collate):
        pass


# Fragmentation, caps and settings


def fragment(block_mib: int, count: int) -> list[Any]:
    """Every other block is freed, so that what is cached is in holes of one block."""
    blocks = [floats(block_mib / 1024) for _ in range(count)]
    return blocks[::2]


@case("unknown", "fragmentation")
def holes_of_128_mib() -> None:
    kept = fragment(128, 15)
    kept.append(floats(0.5))


@case("unknown", "fragmentation", env={"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
def holes_with_max_split_size() -> None:
    kept = fragment(96, 20)
    kept.append(floats(0.25))


@case("forward", "fragmentation")
def holes_before_a_forward() -> None:
    import torch

    layer = torch.nn.Linear(4096, 4096).cuda()
    kept = fragment(64, 28)
    layer(torch.randn(16384, 4096, device="cuda"))
    print(kept)


@case("unknown", env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
def expandable_segments() -> None:
    kept = [floats(0.25) for _ in range(100)]
    print(kept)


@case("unknown", "single_huge_allocation", env={"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
def expandable_segments_one_block() -> None:
    floats(12.0)


@case("unknown", "single_huge_allocation", cap=None)
def far_more_than_the_card() -> None:
    floats(4000.0)


@case("unknown", env={"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"})
def cuda_malloc_async() -> None:
    kept = [floats(0.25) for _ in range(100)]
    print(kept)


@case("unknown", "leak")
def losses_kept_with_their_graphs() -> None:
    import torch

    model = torch.nn.Linear(4096, 4096).cuda()
    total = torch.zeros((), device="cuda")
    for _ in range(1000):
        total = total + model(torch.randn(8192, 4096, device="cuda")).pow(2).mean()


@case("unknown")
def inside_a_cuda_graph() -> None:
    import torch

    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        kept = [floats(0.25) for _ in range(100)]
    print(kept)


@case("forward")
def no_executable_batch_size() -> None:
    from accelerate.utils import find_executable_batch_size

    model = llama(layers=2, attention="eager", device="cuda")
    find_executable_batch_size(starting_batch_size=4)(lambda batch_size: model(**tokens(batch_size, 16384)))()


# Several processes


HOG = """
import sys, time, torch
spare = int(float(sys.argv[1]) * 2**30)
kept = []
for block in (1 << 30, 64 << 20, 2 << 20):
    while torch.cuda.mem_get_info()[0] - spare > block:
        kept.append(torch.empty(block, dtype=torch.uint8, device="cuda"))
print("held", flush=True)
time.sleep(120)
"""


def hog(spare_gib: float) -> subprocess.Popen[str]:
    """Another process that leaves so much of the card."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOG, str(spare_gib)],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
    )
    assert other.stdout is not None
    other.stdout.readline()
    return other


@case("load", "other_process", cap=None, alone=True)
def other_process_while_loading() -> None:
    other = hog(1.0)
    try:
        llama(hidden=2048, layers=8).to("cuda")
    finally:
        other.kill()


@case("forward", "other_process", cap=None, alone=True)
def other_process_in_forward() -> None:
    other = hog(2.0)
    try:
        trainer(llama(layers=24), 8, 2048).train()
    finally:
        other.kill()


@case("unknown", "other_process", kind="cuda_error_oom", cap=None, alone=True)
def no_room_for_a_context() -> None:
    import torch

    other = hog(0.05)
    try:
        torch.zeros(1, device="cuda")
    finally:
        other.kill()


@case(
    "unknown",
    "unknown",
    kind="cublas_alloc",
    cap=None,
    alone=True,
    env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
)
def no_room_for_cublas() -> None:
    import torch

    left, right = torch.randn(64, 64, device="cuda"), torch.randn(64, 64, device="cuda")
    kept = fill_the_card()
    left @ right
    print(kept)


@case(
    "forward",
    "unknown",
    kind="cudnn_alloc",
    cap=None,
    alone=True,
    env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
)
def no_room_for_cudnn() -> None:
    import torch

    image, net = torch.randn(1, 3, 64, 64, device="cuda"), torch.nn.Conv2d(3, 8, 3).cuda()
    kept = fill_the_card()
    net(image)
    print(kept)


def fill_the_card() -> list[Any]:
    import torch

    kept = []
    for block in (1 << 30, 16 << 20, 2 << 20, 1 << 19):
        try:
            while True:
                kept.append(torch.empty(block, dtype=torch.uint8, device="cuda"))
        except torch.cuda.OutOfMemoryError:
            pass
    return kept


@case("load", cap=0.4, launcher=("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611"))
def two_ranks_load_on_one_card() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = llama(hidden=2048)
    dist.barrier()
    model.to("cuda:0")


@case(
    "backward", cap=0.9, launcher=("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29612")
)
def one_rank_of_two_fails() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = llama(hidden=2048, device="cuda:0")
    if dist.get_rank() == 1:
        step_until(model, tokens(1, 64))
    dist.barrier()


@case("forward", launcher=("-m", "accelerate.commands.launch", "--num_processes=1", "--mixed_precision=bf16"))
def accelerate_launch() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = accelerator.prepare(llama(layers=16))
    accelerator.backward(model(**tokens(8, 2048)).loss)


# Host memory


@case("unknown", "host_ram", kind="host_oom", cap=None)
def cpu_allocator() -> None:
    floats(1 << 20, "cpu")


@case("load", "host_ram", kind="host_oom", cap=None)
def model_larger_than_the_host() -> None:
    import torch

    torch.nn.Linear(1 << 22, 1 << 22)


@case("unknown", "host_ram", kind="host_oom", cap=None)
def numpy_array() -> None:
    import numpy

    numpy.ones((1 << 22, 1 << 22))


# Running them


def run_case(name: str) -> None:
    """Inside the case's own process."""
    chosen = CASES[name]
    if chosen.cap is not None:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(chosen.cap * GIB / total, 0)
    chosen.run()


def text_of(name: str) -> dict[str, Any]:
    """Run a case and give its line."""
    chosen = CASES[name]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *chosen.launcher, str(Path(__file__).resolve()), "--case", name]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env={**env, **chosen.env},
            capture_output=True,
            timeout=SECONDS,
            errors="replace",
            text=True,
        )
        text, code = done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        text, code = (error.stderr or b"").decode("utf-8", "replace"), None
    label = {
        "kind": chosen.kind,
        "phase": chosen.phase,
        "cause": chosen.cause,
        "cap_gib": chosen.cap,
        **chosen.label,
    }
    seconds = round(time.monotonic() - started, 1)
    return {"id": name, "text": text, "label": label, "exit_code": code, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?")
    parser.add_argument("--case")
    parser.add_argument("--only", nargs="*", help="ids to run, all if left out")
    given = parser.parse_args()
    if given.case:
        run_case(given.case)
        return
    names = given.only or list(CASES)
    alone = [name for name in names if CASES[name].alone]
    with Path(given.out).open("w", encoding="utf-8") as out, ThreadPoolExecutor(AT_ONCE) as pool:

        def keep(row: dict[str, Any]) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()
            last = row["text"].strip().splitlines()[-1:] or ["(nothing)"]
            print(
                f"{row['seconds']:5.1f} s  exit {row['exit_code']}  {row['id']}: {last[0][:110]}", flush=True
            )

        for row in pool.map(text_of, [name for name in names if name not in alone]):
            keep(row)
        for name in alone:
            keep(text_of(name))


if __name__ == "__main__":
    main()
