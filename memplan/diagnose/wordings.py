"""How each library words it: one table, each row with where the wording was read.

A pattern is matched against a stream's text on one line in lower case. It starts with, or lies close to, its
`needle`, a literal that is looked for first: a pattern costs nothing where its needle is absent. No pattern
repeats without a bound or nests a repetition, so that no text can make one slow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from memplan.diagnose.types import Kind


@dataclass(frozen=True)
class Wording:
    """One way to say that something ran out, or that looks as if it did."""

    kind: Kind
    framework: str
    needle: str
    pattern: str
    source: str
    is_weak: bool = False
    """Part of a message, or a summary of it: counts where no full message is near."""


SIZE = r"-?\d[\d,]{0,26}(?:\.\d{1,12})?\s{0,2}(?:bytes?|[kmgtpe]i?b{0,2}|b)\b"
_TORCH_OLD = "c10/cuda/CUDACachingAllocator.cpp, torch 1.0 to 2.0"

WORDINGS: tuple[Wording, ...] = (
    # PyTorch's own allocators
    Wording("cuda_oom", "pytorch", "cuda out of memory", r"cuda out of memory", f"{_TORCH_OLD} and 2.1 to 2.14"),
    Wording("hip_oom", "pytorch", "hip out of memory", r"hip out of memory", "the same, hipified for ROCm"),
    Wording("xpu_oom", "pytorch", "xpu out of memory", r"xpu out of memory", "c10/xpu/XPUCachingAllocator.cpp, torch 2.3"),
    Wording("npu_oom", "pytorch", "npu out of memory", r"npu out of memory", "torch_npu NPUCachingAllocator.cpp"),
    Wording("mps_oom", "pytorch", "mps backend out of memory", r"mps backend out of memory", "aten/src/ATen/mps/MPSAllocator.mm"),
    Wording("mps_oom", "pytorch", "invalid buffer size:", rf"invalid buffer size: {SIZE}", "aten/src/ATen/mps/MPSAllocator.mm"),
    Wording("cuda_oom", "pytorch", "allocation on device", r"allocation on device(?: \d{1,3} would exceed allowed memory| this error means|:? ?$)", "c10/cuda/CUDAMallocAsyncAllocator.cpp, torch 2.0; ComfyUI cuts it short"),
    Wording("cuda_oom", "pytorch", "than 1eb memory", r"tried to allocate more than 1eb memory", "CUDACachingAllocator.cpp and CUDAMallocAsyncAllocator.cpp"),
    Wording("cuda_oom", "pytorch", "total capac", r"gpu \d{1,3} has a total capac\w{0,4} of", "the message's middle, torch 2.1 to 2.14", is_weak=True),
    Wording("cuda_oom", "pytorch", "tried to allocate", rf"tried to allocate {SIZE}", "the message's first figure alone", is_weak=True),
    Wording("cuda_oom", "pytorch", "outofmemoryerror", r"torch\.(?:cuda\.)?outofmemoryerror\b", "torch/__init__.py, torch 1.13 and 2.5", is_weak=True),
    Wording("cuda_oom", "accelerate", "no executable batch size", r"no executable batch size found, reached zero", "accelerate/utils/memory.py", is_weak=True),
    # the driver and NVIDIA's libraries
    Wording("ggml_oom", "llama.cpp", "cuda error: out of memory", r"cuda error: out of memory(?= .{0,300}ggml)", "ggml/src/ggml-cuda/ggml-cuda.cu"),
    Wording("cuda_error_oom", "pytorch", "cuda error: out of memory", r"cuda error: out of memory", "c10/cuda/CUDAException.cpp"),
    Wording("cuda_error_oom", "pytorch", "cuda driver error: out of memory", r"cuda driver error: out of memory", "c10/cuda/driver_api.h"),
    Wording("hip_oom", "pytorch", "hip error: out of memory", r"hip error: out of memory", "the same, hipified for ROCm"),
    Wording("hip_oom", "hip", "hiperroroutofmemory", r"hiperroroutofmemory", "hip_runtime_api.h"),
    Wording("cuda_error_oom", "pytorch", "cuda runtime error (2)", r"cuda runtime error \(2\) ?: out of memory", "THC/THCGeneral.cpp, torch 0.2 to 1.4"),
    Wording("cuda_error_oom", "cuda", "cuda failed with error out of memory", r"cuda failed with error out of memory", "CTranslate2 src/cuda/utils.h"),
    Wording("cuda_error_oom", "bitsandbytes", "error out of memory at line", r"error out of memory at line \d{1,6} in file", "bitsandbytes csrc/compat.cuh and pythonInterface.c"),
    Wording("cuda_error_oom", "cuda", "cudaerrormemoryallocation", r"cudaerrormemoryallocation", "driver_types.h"),
    Wording("cuda_error_oom", "cuda", "cuda_error_out_of_memory", r"cuda_error_out_of_memory", "cuda.h", is_weak=True),
    Wording("cuda_error_oom", "cuda", "cumemalloc failed: out of memory", r"cumemalloc failed: out of memory", "PyCUDA src/cpp/cuda.hpp"),
    Wording("cuda_error_oom", "rapids", "std::bad_alloc: out_of_memory", r"std::bad_alloc: out_of_memory", "rmm/detail/error.hpp"),
    Wording("cuda_error_oom", "rapids", "std::bad_alloc: cuda error", r"std::bad_alloc: cuda error", "rmm/detail/error.hpp, RAPIDS 0.x"),
    Wording("cuda_error_oom", "cuda", "cufft_alloc_failed", r"cufft_alloc_failed", "cufft.h"),
    Wording("cuda_error_oom", "cuda", "cusolver_status_alloc_failed", r"cusolver_status_alloc_failed", "cusolver_common.h"),
    Wording("cuda_error_oom", "tensorrt", "outofmemory (", r"error code 2: outofmemory \(", "TensorRT 8 and 10"),
    Wording("cublas_alloc", "pytorch", "cublas_status_alloc_failed", r"cublas_status_alloc_failed", "ATen/cuda/CUDABlas.cpp"),
    Wording("cublas_alloc", "pytorch", "cublas_status_not_initialized", r"cublas_status_not_initialized", "ATen/cuda/CublasHandlePool.cpp: what a full card answers to cublasCreate"),
    Wording("cudnn_alloc", "pytorch", "cudnn_status_alloc_failed", r"cudnn_status_alloc_failed", "cudnn.h, to 8"),
    Wording("cudnn_alloc", "pytorch", "cudnn_status_not_initialized", r"cudnn_status_not_initialized", "ATen/cudnn/Handle.cpp"),
    Wording("cudnn_alloc", "pytorch", "allocation_failed", r"cudnn_status_internal_error_(?:device|host)_allocation_failed", "cudnn_graph.h 9"),
    Wording("nccl_oom", "nccl", "cuda failure", r"cuda failure (?:2 )?'out of memory'", "NCCL src/include/checks.h"),
    Wording("nccl_oom", "nccl", "failed to cuda ", r"failed to cuda (?:m|c)alloc", "NCCL src/include/alloc.h"),
    # other frameworks
    Wording("cupy_oom", "cupy", "out of memory allocating", r"out of memory allocating [\d,]{1,26} bytes(?= ?[(`*]| \(allocated|$)", "cupy/cuda/memory.pyx"),
    Wording("cupy_oom", "cupy", "cupy.cuda.memory.outofmemoryerror", r"cupy\.cuda\.memory\.outofmemoryerror", "cupy/cuda/memory.pyx", is_weak=True),
    Wording("jax_oom", "jax", "out of memory while trying to allocate", rf"out of memory (?:while )?trying to allocate (?:{SIZE}|\d)", "xla pjrt and se_gpu_pjrt_client.cc"),
    Wording("jax_oom", "jax", "resource_exhausted", r"resource_exhausted: (?:out of memory|ran out of memory|error allocating|failed to allocate|xla:|hbm|attempting)", "xla, tsl/platform/errors.h"),
    Wording("jax_oom", "jax", "ran out of memory in memory space", r"ran out of memory in memory space", "XLA for TPU"),
    Wording("jax_oom", "jax", "error allocating device buffer", r"error allocating device buffer", "XLA for TPU"),
    Wording("jax_oom", "jax", "failed to allocate request for", rf"failed to allocate request for {SIZE}", "xla stream_executor bfc and cuda async allocators"),
    Wording("tf_oom", "tensorflow", "oom when allocating tensor", r"oom when allocating tensor with shape", "tensorflow/core/framework/op_kernel.cc"),
    Wording("tf_oom", "tensorflow", "ran out of memory trying to allocate", rf"ran out of memory trying to allocate {SIZE}", "tsl/framework/bfc_allocator.cc"),
    Wording("tf_oom", "tensorflow", "from device: cuda_error_out_of_memory", r"from device: cuda_error_out_of_memory", "stream_executor/cuda/cuda_driver.cc"),
    Wording("paddle_oom", "paddle", "out of memory error on gpu", r"out of memory error on gpu \d{1,3}", "paddle/fluid/memory/allocation/cuda_allocator.cc"),
    Wording("paddle_oom", "paddle", "resourceexhaustederror", r"resourceexhaustederror: ?(?:out of memory|fail to alloc|cannot)", "paddle/fluid/platform/enforce.h", is_weak=True),
    Wording("ort_oom", "onnxruntime", "failed to allocate memory for requested buffer", r"failed to allocate memory for requested buffer of size", "onnxruntime/core/framework/bfc_arena.cc"),
    Wording("ort_oom", "onnxruntime", "is smaller than requested bytes of", r"available memory of \d{1,20} is smaller than requested bytes of", "onnxruntime/core/framework/bfc_arena.cc"),
    Wording("ort_oom", "onnxruntime", "cuda failure 2: out of memory", r"cuda failure 2: out of memory", "onnxruntime/core/providers/cuda/cuda_call.cc"),
    Wording("ggml_oom", "llama.cpp", "cudamalloc failed: out of memory", r"cudamalloc failed: out of memory", "ggml/src/ggml-cuda/ggml-cuda.cu"),
    Wording("ggml_oom", "llama.cpp", "failed to allocate", r"failed to allocate (?:(?:cuda|rocm|vulkan|sycl|metal|mtl)\d{0,3}|buffer for kv cache|compute buffers|compute pp buffers)", "ggml-alloc.c, src/llama-context.cpp"),
    Wording("ggml_oom", "llama.cpp", "unable to allocate", r"unable to allocate (?:cuda|rocm|vulkan|sycl|backend|cpu)\w{0,20} buffer", "llama.cpp src/llama-model.cpp"),
    Wording("ggml_oom", "llama.cpp", "erroroutofdevicememory", r"erroroutofdevicememory", "ggml/src/ggml-vulkan, vulkan.hpp"),
    Wording("metal_oom", "metal", "kiogpucommandbuffercallbackerroroutofmemory", r"kiogpucommandbuffercallbackerroroutofmemory", "macOS IOGPUFamily"),
    Wording("metal_oom", "mlx", "[metal::malloc]", r"\[metal::malloc\] (?:attempting to allocate|unable to allocate|resource limit)", "mlx/backend/metal/allocator.cpp"),
    Wording("xpu_oom", "sycl", "out_of_device_memory", r"(?:ur_result|ze_result|pi)_error_out_of_device_memory", "oneAPI unified runtime, ur_api.h"),
    Wording("xpu_oom", "sycl", "error_out_of_resources", r"(?:ur_result|ze_result|pi)_error_out_of_resources", "oneAPI unified runtime, ur_api.h"),
    Wording("npu_oom", "pytorch", "el0004", r"el0004: ?(?:\[pid: \d{1,9}\] )?.{0,40}failed to allocate memory", "CANN runtime"),
    # serving engines
    Wording("vllm_kv", "vllm", "to serve at least one request", r"to serve at least one request with the model\S{0,3} max(?:imum)? seq", "vllm/v1/core/kv_cache_utils.py, 0.8"),
    Wording("vllm_kv", "vllm", "no available memory for the cache blocks", r"no available memory for the cache blocks", "vllm/worker/worker.py 0.2 to 0.17"),
    Wording("vllm_kv", "vllm", "free memory on device", r"free memory on device (?:\w{1,8}:\d{1,3} )?\(", "vllm/v1/worker/utils.py"),
    Wording("vllm_kv", "vllm", "the model's max seq len", r"the model's max seq len \(\d{1,9}\) is larger than the maximum number of tokens", "vllm/executor/executor_base.py 0.2 to 0.9"),
    Wording("vllm_kv", "vllm", "not enough kv cache", r"not enough (?:kv cache|gpu) (?:space|blocks)", "vllm/core/scheduler.py", is_weak=True),
    Wording("sglang_kv", "sglang", "not enough memory. please try to increase --mem-fraction-static", r"not enough memory\. please try to increase --mem-fraction-static", "sglang/srt/model_executor/model_runner.py"),
    Wording("sglang_kv", "sglang", "--mem-fraction-static", r"(?:out of memory|not enough memory|increase|decreas\w{1,3}|reduc\w{1,3}|lower\w{0,3}).{0,60}--mem-fraction-static", "sglang/srt/model_executor/model_runner.py", is_weak=True),
    Wording("sglang_kv", "sglang", "fill out of memory", r"(?:pre)?fill out of memory\. ", "sglang/srt/mem_cache/common.py"),
    Wording("sglang_kv", "sglang", "decode out of memory", r"decode out of memory\. ", "sglang/srt/mem_cache/common.py"),
    Wording("sglang_kv", "sglang", "kv cache pool is full", r"kv cache pool is full", "sglang/srt/managers/scheduler.py"),
    # host memory
    Wording("host_oom", "pytorch", "defaultcpuallocator", r"defaultcpuallocator: (?:can't allocate|not enough) memory", "c10/core/impl/alloc_cpu.cpp"),
    Wording("host_oom", "pytorch", "not enough memory: you", r"not enough memory: you (?:tried|want) to allocate \d{1,9}", "TH/THGeneral.cpp, torch 0.4", is_weak=True),
    Wording("host_oom", "numpy", "unable to allocate", rf"unable to allocate (?:array with shape|{SIZE} for an array)", "numpy/_core/_exceptions.py"),
    Wording("host_oom", "python", "cannot allocate memory", r"(?:\[errno 12\] )?cannot allocate memory(?: \(os error 12\))?", "strerror(ENOMEM)"),
    Wording("host_oom", "python", "memoryerror", r"(?<![\w.])memoryerror\b(?! from| as|\)| is| or|`)", "Python's own", is_weak=True),
    Wording("host_oom", "c++", "std::bad_alloc", r"std::bad_alloc\b(?!: (?:out_of|cuda))", "libstdc++"),
    Wording("host_oom", "windows", "the paging file is too small", r"the paging file is too small", "Windows error 1455"),
    Wording("host_oom", "windows", "页面文件太小", r"页面文件太小", "Windows error 1455, Chinese"),
    Wording("host_oom", "kernel", "out of memory: kill", r"(?:memory cgroup )?out of memory: kill(?:ed)? process (?:\d{1,9}|\()", "Linux mm/oom_kill.c"),
    Wording("host_oom", "kernel", "oom-kill:constraint", r"oom-kill:constraint=", "Linux mm/oom_kill.c"),
    Wording("host_oom", "kernel", "invoked oom-killer", r"invoked oom-killer", "Linux mm/oom_kill.c", is_weak=True),
    Wording("host_oom", "kubernetes", "oomkilled", r"\boomkilled\b(?!\W{1,4}false)", "kubelet and Docker's State.OOMKilled"),
    Wording("host_oom", "slurm", "oom_kill", r"\boom_kill(?:ed)? event", "slurm src/plugins/task/cgroup 22"),
    Wording("host_oom", "slurm", "oom-kill event", r"oom-kill event", "slurm src/plugins/task/cgroup 19"),
    Wording("host_oom", "slurm", "exceeded", r"exceeded (?:job|step) memory limit", "slurm src/plugins/jobacct_gather"),
    Wording("host_oom", "slurm", "out_of_memory", r"\bstate(?::|=)? ?out_of_memory|out_of_me\+? ", "slurm's job state", is_weak=True),
    Wording("host_oom", "lsf", "term_memlimit", r"term_memlimit", "LSF"),
    Wording("host_oom", "ray", "node running low on memory", r"task was killed due to the node running low on memory", "ray src/ray/raylet"),
    Wording("host_oom", "ray", "exceeds the memory usage threshold", r"exceeds the memory usage threshold", "ray src/ray/raylet"),
    Wording("host_oom", "pytorch", "is killed by signal: killed", r"dataloader worker \(pid\(?s?\)? ?[\d, ]{1,60}\) is killed by signal: killed", "torch/utils/data/_utils/signal_handling.py"),
    Wording("host_oom", "pytorch", "exitcode", r"exitcode ?: ?-9\b", "torch/distributed/elastic/multiprocessing/api.py"),
    Wording("host_oom", "python", "signal 9", r"signal 9 \(sigkill\)|(?:died with|signal:|by) signal 9\b|<signals\.sigkill: 9>", "subprocess, torchrun"),
    Wording("host_oom", "python", "return code", r"(?:exits|exited) with return code ?= ?-9\b", "deepspeed/launcher/launch.py"),
    Wording("host_oom", "shell", "killed", r"(?:line \d{1,6}: |\[\d{1,3}\] ?\+? ?)\d{1,9} killed\b|(?:zsh|bash|sh): killed\b|\[\d{1,3}\] ?\+ {1,3}\d{0,9} ?killed|killed: 9\b", "bash and zsh"),
    Wording("host_oom", "python", "sigkill", r"\bsigkill\b", "signal(7)", is_weak=True),
    Wording("host_oom", "notebook", "tried to allocate more memory than is available", r"tried to allocate more memory than is available", "Kaggle"),
    Wording("host_oom", "notebook", "after using all available ram", r"after using all available ram", "Google Colab"),
    Wording("shm", "pytorch", "insufficient shared memory", r"insufficient shared memory", "torch/utils/data/_utils/signal_handling.py"),
    Wording("shm", "pytorch", "shared memory", r"unable to (?:write to|open|allocate|mmap|resize)[^.]{0,40} shared memory(?:(?: object| ?\(shm\)| file| for)){0,3}", "torch/csrc and aten/src/ATen/MapAllocator.cpp"),
    Wording("shm", "pytorch", "killed by signal: bus error", r"killed by signal: bus error", "torch/utils/data/_utils/signal_handling.py"),
    Wording("shm", "nccl", "creating shared memory segment", r"error while (?:creating|attaching to) shared memory segment", "NCCL src/misc/shmutils.cc"),
    Wording("shm", "kernel", "no space left on device", r"no space left on device(?=.{0,80}(?:/dev/shm|torch_\d))|/dev/shm\S{0,120}.{0,80}no space left on device", "strerror(ENOSPC)"),
    # nothing ran out of memory
    Wording("load_dispatch", "transformers", "dispatched on the cpu or the disk", r"some modules are dispatched on the cpu or the disk", "transformers quantizers, 4.28 to 5.24"),
    Wording("load_dispatch", "accelerate", "weights offloaded to the disk", r"the current `?device_map`? had weights offloaded to the disk", "transformers modeling_utils.py"),
    Wording("load_dispatch", "accelerate", "offload_dir", r"we need an `?offload_dir`? to dispatch this model", "accelerate big_modeling.py"),
    Wording("not_oom", "triton", "out of resource", r"out of ?resources?: (?:shared memory|registers|out of resource)", "triton/runtime/errors.py"),
    Wording("not_oom", "cuda", "too many resources requested for launch", r"too many resources requested for launch", "cudaErrorLaunchOutOfResources"),
    Wording("not_oom", "cuda", "uses too much shared data", r"uses too much shared data", "ptxas"),
    Wording("not_oom", "pytorch", "device-side assert", r"device-side assert(?:ion)? triggered", "cudaErrorAssert"),
    Wording("not_oom", "pytorch", "illegal memory access", r"an illegal memory access was encountered", "cudaErrorIllegalAddress"),
    Wording("not_oom", "pytorch", "index out of range in self", r"index out of range in self", "aten/src/ATen/native/Embedding.cpp"),
    Wording("not_oom", "java", "os::commit_memory", r"os::commit_memory\(", "HotSpot os.cpp"),
    Wording("not_oom", "java", "java runtime environment to continue", r"insufficient memory for the java runtime environment", "HotSpot os.cpp"),
    Wording("not_oom", "java", "java.lang.outofmemoryerror", r"java\.lang\.outofmemoryerror", "HotSpot"),
    Wording("not_oom", "javascript", "javascript heap out of memory", r"javascript heap out of memory", "V8"),
    Wording("not_oom", "kernel", "no space left on device", r"no space left on device", "strerror(ENOSPC)", is_weak=True),
)  # fmt: skip


@lru_cache(maxsize=512)
def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern, compiled when it is first needed: most never are."""
    return re.compile(pattern)
