"""Texts in the shapes that people paste, with figures of our own: each wording once."""

from __future__ import annotations

CURRENT = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB. GPU 2 has a total capacity of "
    "23.64 GiB of which 1.50 MiB is free. Including non-PyTorch memory, this process has 23.50 GiB memory in "
    "use. Of the allocated memory 23.08 GiB is allocated by PyTorch, and 40.96 MiB is reserved by "
    "PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
LOADING = f"""Traceback (most recent call last):
  File "/srv/job/train.py", line 40, in <module>
    model = AutoModelForCausalLM.from_pretrained(name, device_map="cuda")
  File "/srv/venv/lib/python3.11/site-packages/transformers/modeling_utils.py", line 4100, in from_pretrained
    model = cls._load_pretrained_model(model)
{CURRENT}
"""
OLD = (
    "RuntimeError: CUDA out of memory. Tried to allocate 64.00 MiB (GPU 1; 15.90 GiB total capacity; "
    "14.10 GiB already allocated; 33.00 MiB free; 14.60 GiB reserved in total by PyTorch)"
)
OLDEST = (
    "RuntimeError: CUDA out of memory. Tried to allocate 64.00 MiB (GPU 0; 7.93 GiB total capacity; "
    "7.10 GiB already allocated; 12.50 MiB free; 120.25 MiB cached)"
)
CAPPED = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of "
    "79.18 GiB of which 70.00 GiB is free. Including non-PyTorch memory, this process has 4.50 GiB memory in "
    "use. 4.00 GiB allowed; Of the allocated memory 3.70 GiB is allocated by PyTorch, and 10.00 MiB is "
    "reserved by PyTorch but unallocated."
)
FRAGMENTED = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total "
    "capacty of "
    "31.73 GiB of which 512.00 MiB is free. Process 4242 has 31.20 GiB memory in use. Of the allocated "
    "memory "
    "26.00 GiB is allocated by PyTorch, and 4.50 GiB is reserved by PyTorch but unallocated."
)
SHARED = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 256.00 MiB. GPU 0 has a total capacity of "
    "39.49 GiB of which 100.00 MiB is free. Process 77 has 30.00 GiB memory in use. Including non-PyTorch "
    "memory, this process has 9.30 GiB memory in use. Of the allocated memory 8.80 GiB is allocated by "
    "PyTorch, and 20.00 MiB is reserved by PyTorch but unallocated."
)
ASYNC = """torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out of memory)
Currently allocated     : 1.75 GiB
Requested               : 256.00 MiB
Device limit            : 79.18 GiB
Free (according to CUDA): 76.81 GiB
PyTorch limit (set by user-supplied memory fraction)
                        : 2.00 GiB
"""
ONE_OF_EACH: dict[str, tuple[str, str]] = {
    "hip": ("hip_oom", CURRENT.replace("CUDA out", "HIP out")),
    "xpu": (
        "xpu_oom",
        (
            "torch.OutOfMemoryError: XPU out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
            "capacity of "
            "15.56 GiB. Of the allocated memory 14.00 GiB is allocated by PyTorch, and 10.00 MiB is "
            "reserved by "
            "PyTorch but unallocated. Please use `empty_cache` to release all unoccupied cached memory."
        ),
    ),
    "npu": (
        "npu_oom",
        (
            "RuntimeError: NPU out of memory. Tried to allocate 1.00 GiB (NPU 3; 60.97 GiB total capacity; "
            "58.00 GiB "
            "already allocated; 58.00 GiB current active; 500.00 MiB free; 59.00 GiB reserved in total by "
            "PyTorch)"
        ),
    ),
    "mps": (
        "mps_oom",
        (
            "RuntimeError: MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 "
            "GB, max "
            "allowed: 18.13 GB). Tried to allocate 512.00 MB on private pool."
        ),
    ),
    "driver": ("cuda_error_oom", "RuntimeError: CUDA error: out of memory"),
    "accelerator": ("cuda_error_oom", "torch.AcceleratorError: CUDA error: out of memory"),
    "bitsandbytes": (
        "cuda_error_oom",
        "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp",
    ),
    "cublas": ("cublas_alloc", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": ("cudnn_alloc", "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "nccl": ("nccl_oom", "host:1:2 [0] include/alloc.h:42 NCCL WARN Cuda failure 2 'out of memory'"),
    "cupy": (
        "cupy_oom",
        (
            "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 2,147,483,648 bytes "
            "(allocated so far: "
            "1,073,741,824 bytes)."
        ),
    ),
    "ggml": ("ggml_oom", "ggml_cuda: allocating 590.00 MiB on device 1: cudaMalloc failed: out of memory"),
    "jax": ("jax_oom", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes."),
    "tensorflow": (
        "tf_oom",
        (
            "OOM when allocating tensor with shape[1024,1024] and type float on "
            "/job:localhost/replica:0/task:0/device:GPU:1 by allocator GPU_1_bfc"
        ),
    ),
    "paddle": (
        "paddle_oom",
        (
            "Out of memory error on GPU 0. Cannot allocate 1.500000GB memory on GPU 0, 10.000000GB memory "
            "has been "
            "allocated and available memory is only 1.000000GB."
        ),
    ),
    "onnxruntime": ("ort_oom", "BFCArena: Failed to allocate memory for requested buffer of size 4096"),
    "vllm": (
        "vllm_kv",
        (
            "ValueError: Free memory on device cuda:1 (10.00/24.00 GiB) on startup is less than desired "
            "GPU memory "
            "utilization (0.9, 21.60 GiB)."
        ),
    ),
    "vllm length": (
        "vllm_kv",
        (
            "To serve at least one request with the model's max seq len (32768), (4.00 GiB KV cache is "
            "needed, which "
            "is larger than the available KV cache memory (1.50 GiB)"
        ),
    ),
    "sglang": ("sglang_kv", "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."),
    "cpu allocator": (
        "host_oom",
        "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 65536000 bytes.",
    ),
    "numpy": (
        "host_oom",
        "MemoryError: Unable to allocate 8.00 GiB for an array with shape (1024, 1024, 1024)",
    ),
    "kernel": ("host_oom", "Out of memory: Killed process 42 (python) total-vm:9kB, anon-rss:1048576kB"),
    "kubernetes": ("host_oom", "    Last State: Terminated\n      Reason: OOMKilled\n      Exit Code: 137"),
    "torchrun": ("host_oom", "failed (exitcode: -9) local_rank: 1 (pid: 9) of binary: /usr/bin/python3"),
    "slurm": ("host_oom", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0"),
    "shell": ("host_oom", "run.sh: line 12: 24905 Killed                  python train.py"),
    "windows": (
        "host_oom",
        "OSError: [WinError 1455] The paging file is too small for this operation to complete",
    ),
    "shm": (
        "shm",
        "ERROR: Unexpected bus error in worker. This might be caused by insufficient shared memory (shm).",
    ),
    "dispatch": ("load_dispatch", "ValueError: Some modules are dispatched on the CPU or the disk."),
    "triton": ("not_oom", "OutOfResources: out of resource: shared memory, Required: 1, Hardware limit: 0"),
    "assert": ("not_oom", "RuntimeError: CUDA error: device-side assert triggered"),
    "corrupt size": ("cuda_oom", "RuntimeError: Tried to allocate more than 1EB memory."),
}
