"""How frameworks say that memory has run out: one table, each row with where it was read.

A row's pattern finds its message; a space stands for a line wrap too. Rows come in the order in which they
are asked: where two match at one place, the earlier wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from memplan.diagnosis.types import Kind


@dataclass(frozen=True)
class Wording:
    """One way to say it."""

    kind: Kind
    framework: str | None
    """Who speaks; None where only the frames can tell."""
    family: str
    """Which figures to read: see `figures`."""
    pattern: re.Pattern[str]
    source: str


_SPACE = re.compile(r" (\?|\{\d+,\d*\})?")


def _row(kind: Kind, framework: str | None, family: str, pattern: str, source: str) -> Wording:
    return Wording(kind, framework, family, re.compile(_SPACE.sub(_wrap, pattern)), source)


def _wrap(space: re.Match[str]) -> str:
    counted = space[1]
    return r"\s{1,12}" if counted is None else r"\s{0,12}" if counted == "?" else rf"\s{counted}"


WORDINGS: tuple[Wording, ...] = (
    # PyTorch's allocators
    _row("cuda_oom", None, "torch", r"CUDA out of memory", "torch 0.4-2.14, CUDACachingAllocator.cpp"),
    _row("cuda_oom", None, "torch", r"would exceed allowed memory", "torch 2.0+, CUDAMallocAsyncAllocator.cpp"),
    _row("cuda_oom", None, "torch", r"Allocation on device \d{0,3}[^\n]{0,40}would exceed", "torch 2.0+"),
    _row("cuda_oom", None, "torch", r"Allocation on device ?(?=\n|$)", "torch 2.7+ under cudaMallocAsync"),
    _row("cuda_oom", None, "torch", r"memory allocation failed with OOM on device", "torch 2.14"),
    _row("cuda_oom", None, "torch", r"expandable_segments: memory mapping failed with OOM", "torch 2.14"),
    _row("cuda_oom", None, "torch", r"preemptively rejected because it would exceed", "torch 2.14"),
    _row("cuda_oom", None, "torch", r"CUDAOutOfMemoryError", "torch.cuda before 1.13, and wrappers"),
    _row("hip_oom", None, "torch", r"HIP out of memory", "torch for ROCm, the hipified allocator"),
    _row("hip_oom", None, "torch", r"HIP error: out of memory|hipErrorOutOfMemory|hipErrorMemoryAllocation", "HIP runtime"),
    _row("xpu_oom", None, "torch", r"XPU out of memory", "torch 2.3+, XPUCachingAllocator.cpp"),
    _row("xpu_oom", "sycl", "none", r"U?R?_?RESULT_ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY|PI_ERROR_OUT_OF_RESOURCES|UR_RESULT_ERROR_OUT_OF_RESOURCES", "SYCL, Level Zero"),
    _row("npu_oom", None, "torch", r"NPU out of memory", "torch_npu, NPUCachingAllocator.cpp"),
    _row("npu_oom", None, "torch", r"ACL_ERROR_RT_MEMORY_ALLOCATION|aclrtMalloc[^\n]{0,60}failed|rtMalloc[^\n]{0,30}failed|EL0004|alloc device memory failed|EL0010: Memory", "CANN"),
    _row("mps_oom", None, "mps", r"MPS backend out of memory", "torch 1.13+, MPSAllocator.mm"),
    _row("mps_oom", None, "mps", r"Invalid buffer size: \d", "torch 1.13+, MPSAllocator.mm"),
    # Apple's own
    _row("metal_oom", None, "metal", r"kIOGPUCommandBufferCallbackErrorOutOfMemory", "Metal command buffers"),
    _row("metal_oom", None, "metal", r"\[METAL\] Command buffer execution failed: Insufficient Memory", "mlx"),
    _row("metal_oom", "mlx", "metal", r"\[(?:metal::)?malloc(?:_or_wait)?\] (?:Attempting to allocate|Unable to allocate)", "mlx, allocator.cpp"),
    # llama.cpp and its kin
    _row("ggml_oom", "llama.cpp", "ggml", r"allocating [\d.]{1,12} MiB on device \d{1,3}: (?:cuda|hip|musa)Malloc failed", "ggml-cuda.cu"),
    _row("ggml_oom", "llama.cpp", "ggml", r"(?:cuda|hip)Malloc failed: out of memory", "ggml-cuda.cu"),
    _row("ggml_oom", "llama.cpp", "ggml", r"ggml_gallocr_reserve_n(?:_impl)?: failed to allocate", "ggml-alloc.c"),
    _row("ggml_oom", "llama.cpp", "ggml", r"ggml_vulkan: Device memory allocation of size \d{1,20} failed|ErrorOutOfDeviceMemory|VK_ERROR_OUT_OF_DEVICE_MEMORY", "ggml-vulkan.cpp"),
    _row("ggml_oom", "llama.cpp", "ggml", r"(?:failed to allocate|unable to allocate) (?:backend |(?:CUDA|ROCm|Vulkan|Metal|SYCL)\d{0,2} )(?:compute )?buffers?", "llama.cpp"),
    _row("ggml_oom", "llama.cpp", "ggml", r"failed to allocate buffer for kv cache|ggml_backend_\w{2,40}_alloc_buffer: (?:error: )?failed to allocate", "llama.cpp"),
    _row("ggml_oom", "llama.cpp", "ggml", r"CUDA error(?: 2 at [^\n]{1,200})?: out of memory (?:current device: \d|in function|evaluating|\n {0,4}current device)", "ggml-cuda.cu, ggml_cuda_error"),
    _row("host_oom", "ollama", "requires", r"requires more system memory", "ollama, server"),
    # libraries on top of CUDA
    _row("nccl_oom", None, "nccl", r"Cuda failure(?: \d)? '?out of memory'?|Failed to CUDA (?:calloc|malloc|host alloc)[^\n]{0,60}", "nccl, checks.h and alloc.h"),
    _row("cublas_alloc", None, "none", r"(?:CUBLAS|HIPBLAS|ROCBLAS)_STATUS_(?:ALLOC_FAILED|MEMORY_ERROR)|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublasCreate|rocblas_status_memory_error", "cuBLAS"),
    _row("cudnn_alloc", None, "none", r"CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED|Unable to find a valid cuDNN algorithm", "cuDNN 6-9, torch"),
    _row("cuda_error_oom", None, "none", r"CUFFT_ALLOC_FAILED|CU(?:SOLVER|SPARSE|RAND)_STATUS_ALLOC_FAILED", "cuFFT and its siblings"),
    _row("cupy_oom", "cupy", "bytes", r"cupy[.\w]{0,40}OutOfMemoryError|Out of memory allocating [\d,]{1,25} bytes \(allocated so far", "cupy, cuda/memory.pyx"),
    _row("cupy_oom", "cupy", "bytes", r"(?:rmm|RMM)[^\n]{0,200}(?:out_of_memory|Maximum pool size exceeded)|std::bad_alloc: out_of_memory", "RMM"),
    # JAX, TensorFlow, Paddle, ONNX Runtime
    _row("tf_oom", "tensorflow", "tf", r"OOM when allocating tensor", "tensorflow, op_kernel"),
    _row("tf_oom", "tensorflow", "tf", r"tensorflow\.(?:python\.)?[\w.]{0,60}ResourceExhaustedError|Dst tensor is not initialized", "tensorflow, errors_impl.py"),
    _row("tf_oom", "tensorflow", "xla", r"(?:tensorflow|stream_executor)[^\n]{0,200}(?:failed to allocate [^\n]{0,60}CUDA_ERROR_OUT_OF_MEMORY|could not allocate pinned host memory)", "tensorflow, cuda_driver.cc"),
    _row("jax_oom", "jax", "xla", r"RESOURCE_EXHAUSTED: [^\n]{0,200}(?:[Mm]emory|[Aa]llocat|OOM)|Resource exhausted: Out of memory", "XLA"),
    _row("jax_oom", "jax", "xla", r"Out of memory (?:while trying to allocate|allocating) \d{1,20} bytes", "XLA, pjrt"),
    _row("jax_oom", "jax", "xla", r"Ran out of memory in memory space \w{1,20}|Attempting to (?:reserve|allocate) [\d.]{1,12}[KMG]i?B?(?: at the (?:bottom|top) of memory)?\. That was not possible", "XLA for TPU"),
    _row("tf_oom", "tensorflow", "xla", r"Allocator \(\w{1,40}\) ran out of memory trying to allocate", "tensorflow and XLA, bfc_allocator.cc"),
    _row("cuda_error_oom", None, "xla", r"failed to allocate [\d.]{1,12}[KMG]?i?B? \(\d{1,20} bytes\) from device: (?:CUDA_ERROR_OUT_OF_MEMORY|RESOURCE_EXHAUSTED)", "XLA, device memory"),
    _row("paddle_oom", "paddle", "paddle", r"Out of memory error on GPU \d{1,3}", "paddle, cuda_allocator.cc"),
    _row("paddle_oom", "paddle", "paddle", r"Cannot allocate [\d.]{1,20}\s?[KMGT]i?B memory on GPU", "paddle"),
    _row("paddle_oom", "paddle", "paddle", r"ResourceExhaustedError: {1,4}(?:Out of memory|Fail to alloc memory)", "paddle"),
    _row("ort_oom", "onnxruntime", "ort", r"Failed to allocate memory for requested buffer of size", "onnxruntime, bfc_arena.cc"),
    _row("ort_oom", "onnxruntime", "ort", r"Available memory of \d{1,20} is smaller than requested bytes of", "onnxruntime, bfc_arena.cc"),
    _row("ort_oom", "onnxruntime", "ort", r"onnxruntime[^\n]{0,300}(?:CUDA failure 2: out of memory|CUDA error cudaErrorMemoryAllocation)|CUDA failure 2: out of memory ; GPU=", "onnxruntime, cuda_call.cc"),
    # engines
    _row("vllm_kv", "vllm", "vllm", r"No available memory for the cache blocks", "vllm, worker and kv_cache_utils.py"),
    _row("vllm_kv", "vllm", "vllm", r"To serve at least one request with the models?'?s? max seq len", "vllm, kv_cache_utils.py"),
    _row("vllm_kv", "vllm", "vllm", r"The model'?s max seq len \(\d{1,9}\) is larger than the maximum number of tokens", "vllm, executor"),
    _row("vllm_kv", "vllm", "vllm", r"Free memory on device [\w:]{0,12} ?\([\d./\s]{3,40}GiB\) on startup is less than", "vllm, v1/worker/utils.py"),
    _row("vllm_kv", "vllm", "vllm", r"KV cache is needed, which is larger than the available KV cache memory", "vllm, kv_cache_utils.py"),
    _row("vllm_kv", "vllm", "vllm", r"Error in memory profiling|initial free memory [^\n]{0,80}current free memory", "vllm, memory profiling"),
    _row("sglang_kv", "sglang", "vllm", r"Not enough memory\. Please try to increase --?-?mem-fraction-static", "sglang, model_runner.py"),
    _row("sglang_kv", "sglang", "vllm", r"Prefill out of memory\. Try to lower your batch size|Decode out of memory\. Try to lower your batch size", "sglang, scheduler and mem_cache"),
    _row("sglang_kv", "sglang", "vllm", r"KV [Cc]ache pool is full|Please set a smaller number for `?--max-running-requests", "sglang"),
    _row("vllm_kv", "vllm", "vllm", r"not enough KV cache space", "vllm, scheduler"),
    # CUDA itself
    _row("cuda_error_oom", "bitsandbytes", "none", r"Error out of memory at line \d{1,5} in file", "bitsandbytes 0.39-0.50, csrc"),
    _row("cuda_error_oom", None, "cuda", r"CUDA (?:driver )?error:? (?:\d{1,3} ?)?(?:\[[^\]\n]{0,200}\])?[:(]? ?(?:out of memory|OOM)", "c10/cuda, and many others"),
    _row("cuda_error_oom", "tensorrt", "bytes", r"Requested amount of GPU memory \(\d{1,20} bytes\) could not be allocated|OutOfMemory \(Requested size was \d{1,20} bytes|Cuda Runtime \(out of memory\)", "TensorRT"),
    _row("cuda_error_oom", "directml", "bytes", r"Could not allocate tensor with \d{1,20} bytes", "torch-directml"),
    _row("cuda_error_oom", None, "cuda", r"CUDA failed with error out of memory", "ctranslate2"),
    _row("cuda_error_oom", None, "cuda", r"cuda runtime error \(2\) ?:? ?out of memory|error=2 : out of memory", "torch 0.3-1.4, THC"),
    _row("cuda_error_oom", None, "cuda", r"CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|cuMemAlloc(?:_v2)?(?: failed|\(\)? failed)|cuMemCreate failed", "CUDA driver and runtime"),
    _row("cuda_error_oom", None, "cuda", r"[Cc][Uu][Dd][Aa](?: runtime)? (?:error|failure)[^\n]{0,120}out of memory", "CUDA runtime, as wrappers print it"),
    # the host
    _row("not_oom", "triton", "none", r"[Oo]ut ?[Oo]f ?[Rr]esources?: (?:shared memory|tensor memory|registers|threads)", "triton, runtime/errors.py"),
    _row("not_oom", None, "none", r"device-side assert triggered|uses too much shared data|too many resources requested for launch|exceeds? (?:the )?(?:maximum )?shared memory", "CUDA"),
    _row("shm", None, "none", r"insufficient shared memory \(shm\)|unable to allocate shared memory ?\(shm\)|unable to (?:open|write|mmap|resize) [^\n]{0,40}(?:shared memory|file </torch_)|No space left on device[^\n]{0,60}/dev/shm|/dev/shm[^\n]{0,200}No space left on device", "torch, MapAllocator.cpp and dataloader"),
    _row("shm", None, "none", r"is killed by signal: Bus error|Error while (?:creating|attaching to) shared memory segment|out of shared memory|Bus error \(core dumped\)", "torch dataloader, nccl"),
    _row("not_oom", None, "none", r"No space left on device|StorageFull|[Dd]isk quota exceeded", "the C library: a disk is full"),
    _row("host_oom", None, "bytes", r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)", "c10/core/impl/alloc_cpu.cpp"),
    _row("host_oom", None, "bytes", r"alloc_cpu\.cpp:\d{1,4}\]", "c10/core/impl/alloc_cpu.cpp"),
    _row("host_oom", None, "numpy", r"Unable to allocate [\d.]{1,12} [KMGTP]?i?B for an array|(?:numpy[\w.]{0,40})MemoryError|Unable to allocate array with shape", "numpy"),
    _row("host_oom", "kernel", "kernel", r"(?:Memory cgroup o|O)ut of memory: Kill(?:ed)? process|invoked oom-killer|oom-kill:constraint|oom_reaper: reaped process", "linux, mm/oom_kill.c"),
    _row("host_oom", "kubernetes", "limit", r"OOMKilled|OOM ?Killed|\bOOM killed", "kubernetes, slurm"),
    _row("host_oom", "slurm", "limit", r"[Dd]etected \d{1,6} oom[-_ ]kill event|oom[-_]kill event|OUT_OF_MEMORY\b|slurmstepd: error: [^\n]{0,80}[Ee]xceeded (?:job|step) memory limit", "slurm"),
    _row("host_oom", "lsf", "limit", r"TERM_MEMLIMIT|job killed after reaching LSF memory usage limit|=>> PBS: job killed: mem", "LSF, PBS"),
    _row("host_oom", "systemd", "none", r"killed by the OOM killer|result 'oom-kill'|Result=oom-kill", "systemd"),
    _row("host_oom", "ray", "ray", r"Task was killed due to the node running low on memory|(?:worker|Worker)\(?s?\)? (?:was|were) killed (?:due to|by) [^\n]{0,60}(?:OOM|memory)|ray[\w.]{0,30}OutOfMemoryError", "ray, memory monitor"),
    _row("host_oom", "windows", "none", r"[Pp]aging file is too small|WinError 1455", "Windows"),
    _row("host_oom", "java", "none", r"java\.lang\.OutOfMemoryError|JavaScript heap out of memory", "JVM, node"),
    _row("host_oom", None, "none", r"tried to allocate more memory than is available|crashed after using all available RAM|[Tt]he node was low on resource: memory|excessive memory usage causing the Operating System to kill|exceeding (?:physical |virtual )?memory limits|[Mm]emory limit exceeded|[Ee]xceeded (?:job |step )?memory limit", "Kaggle, Colab, kubernetes, joblib, YARN, slurm"),
    _row("host_oom", None, "bytes", r"malloc of size \d{1,20} failed|tcmalloc: large alloc|ggml_aligned_malloc: insufficient memory", "arrow, tcmalloc, ggml"),
    _row("host_oom", None, "none", r"is killed by signal: Killed|DataLoader worker [^\n]{0,60}exited unexpectedly", "torch dataloader"),
    _row("host_oom", None, "none", r"exit ?code ?[:=]? ?\(?-9\b|return(?:ed|s)? (?:non-zero )?(?:exit )?(?:code|status) ?[:=]? ?-9\b|died with <Signals\.SIGKILL|Signal 9 \(SIGKILL\)|[Ee]xit(?:ed)?(?: with)? ?(?:code|status)? ?[:=]? ?137\b|SIGKILL|signal: killed|(?:killed|terminated) (?:by|with) signal:? 9\\b|[Pp]in memory thread exited unexpectedly", "torchrun, deepspeed, accelerate, docker"),
    _row("host_oom", None, "none", r"std::bad_alloc|[Cc]annot allocate memory|\[Errno 12\]|(?:^|\n)[^\n]{0,40}\bMemoryError\b|virtual memory exhausted", "C++, Python and the C library"),
    _row("host_oom", None, "none", r"(?:^|\n)\s{0,8}Killed\s{0,4}(?:\n|$)|\b\d{1,9} Killed {1,30}\S|\bKilled (?:python|accelerate|torchrun|deepspeed)|zsh: killed", "shells"),
    _row("host_oom", None, "none", r"\b(?:RAM|[Hh]ost memory|CPU memory|[Ss]ystem memory) (?:OOM|out of memory)|(?:CPU|[Hh]ost|RAM|[Ss]ystem) out of memory", "prose"),
    # placement
    _row("load_dispatch", None, "none", r"[Ss]ome modules are dispatched on the CPU or the disk", "transformers 4.28+, bitsandbytes quantizers"),
    _row("load_dispatch", None, "none", r"had weights offloaded to the disk|offload the whole model to the disk|with CPU or disk offload", "transformers, accelerate"),
    # the least that still says it
    _row("cuda_oom", None, "torch", r"torch\.(?:cuda\.)?OutOfMemoryError(?!: (?:HIP|XPU|NPU|MPS))", "torch 1.13+"),
    _row("cuda_oom", None, "torch", r"(?:GPU|[Cc]uda|VRAM) (?:ran |run |is |runs )?(?:OOM|out of memory)|[Tt]ried to allocate (?:[\d.]{1,12} [KMG]i?B|more than 1EB)", "prose"),
    _row("cuda_oom", None, "torch", r"GPU \d{0,3} has a total capaci?ty of", "a paste that starts late"),
)  # fmt: skip
