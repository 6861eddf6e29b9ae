"""Which phase of a job a failure fell in: from the frames, and where there are none from the words around."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice

from memplan.diagnosis.types import Finding, Frame, Kind, Phase
from memplan.diagnosis.wordings import compiled

_BY_KIND: dict[Kind, Phase] = {"vllm_kv": "load", "load_dispatch": "load", "shm": "data"}
_UNLESS_SHOWN: dict[Kind, Phase] = {"metal_oom": "generate"}
"""What these kinds mostly fall in, where neither frames nor words say otherwise."""


@dataclass(frozen=True)
class _Rule:
    """A phase and what shows it: names of functions, parts of paths, words of the source line.

    A source line may call something else before what the rule looks for, `loss_of(model(x)).backward()`, so
    it counts only where torch alone is below it, or nothing at all for `innermost` rules.
    """

    phase: Phase
    functions: str = r"(?!)"
    paths: str = r"(?!)"
    sources: str = r"(?!)"
    innermost: bool = False


_SURROUNDING = (
    _Rule(
        "generate",
        functions=r"(?:.*\.)?(?:_?generate\w*|_sample|_?greedy_search|_?beam_search|_contrastive_search"
        r"|decode_loop"
        r"|sample_stream|stream_chat|chat|execute_model|\w*prefill\w*|transcribe|text2img|img2img"
        r"|txt2img|render_\w+|sampl(?:e|ing)(?:_\w+)?|p_sample\w*|(?:run|encode|decode)_(?:vae|image"
        r"|video)\w*)$",
        paths=(
            r"transformers/generation/|/diffusers/pipelines/|/pipelines/\w+\.py$|k_diffusion"
            r"|(?i:comfyui|stable-diffusion)"
        ),
        sources=r"\.generate\(",
    ),
    _Rule(
        "eval",
        functions=r"(?:.*\.)?(?:evaluate\w*|\w+_eval|evaluation_\w+|_?eval(?:_\w+)?|prediction_(?:step|loop)"
        r"|predict(?:_\w+)?"
        r"|validat(?:e|ion)(?:_\w+)?|_run_validation|test(?:_(?:step|epoch|loop|model))?|run_eval\w*"
        r"|_maybe_log_save_evaluate|nested_\w+)$",
        paths=r"loops/evaluation_loop|lm_eval/",
    ),
    _Rule(
        "save",
        functions=r"(?:.*\.)?(?:_?save(?:_\w+)?|save_\w+|_save\w*|merge_and_unload|state_dict"
        r"|full_state_dict|get_model_state_dict"
        r"|_full_post_state_dict_hook|_gather_state_dict|consolidate\w*|export\w*)$",
        paths=r"distributed/checkpoint/state_dict",
        sources=r"\.save_pretrained\(|torch\.save\(|\.state_dict\(\)|merge_and_unload\(",
    ),
)
"""Phases that contain others: a forward pass within `generate` is generating."""
_LOADING = _Rule(
    "load",
    functions=r"(?:.*\.)?(?:_?from_pretrained|from_single_file|from_checkpoint|_?load(?:_\w+)?|load_\w+"
    r"|_load_\w+|build_model\w*|create_model\w*"
    r"|_move_model_to_device|_?deserialize\w*|dispatch_model|prepare_model\w*|_prepare_\w+model"
    r"|init_device|init_model\w*|init_worker\w*|initialize\w*|_initialize\w*"
    r"|profile_run|determine_(?:num_)?available\w*|_init_executor|_materialize_copy|get_peft_model"
    r"|inject_adapter|_init_flat_param\w*"
    r"|fully_shard|flatten_tensors\w*|_allocate_kv_cache\w*|warm_?up\w*|capture_model"
    r"|_sync_module_states|move_\w*_to_device|setup_model\w*)$",
    paths=r"core_model_loading|integrations/accelerate|model_loader|/fsdp/(?:_flat_param|_init_utils"
    r"|_fully_shard/_fsdp_init)"
    r"|modeling_utils\.py$|quantizers/",
    sources=(
        r"\.from_pretrained\(|DistributedDataParallel\(|\bDDP\(|FullyShardedDataParallel\(|\bFSDP\("
        r"|fully_shard\(|(?<!\w)model\.(?:to|cuda|half)\("
    ),
)
_STAGES = (
    _Rule(
        "optimizer",
        functions=r"(?:.*\.)?(?:optimizer_step|_init_group|_?(?:single|multi)_tensor_\w+"
        r"|_take_model_step|step_optimizer|clip_grad\w*|init_state"
        r"|_update_scale|unscale_|initialize_optimizer_states|multi_tensor_applier|_fused_\w+)$",
        paths=(
            r"torch/optim/(?!lr_scheduler)|bitsandbytes/optim|/optimizers?/|_optimizer\.py$"
            r"|accelerate/optimizer|apex/optimizers|/zero/stage_\w+\.py$"
        ),
        sources=r"optim(?:izer)?\w*\.step\(|clip_grad_norm_",
        innermost=True,
    ),
    _Rule(
        "backward",
        functions=(
            r"(?:.*\.)?(?:backward\w*|run_backward|_engine_run_backward|_backward\w*|\w+_backward"
            r"|autograd_\w+)$"
        ),
        paths=r"torch/_tensor\.py$|torch/tensor\.py$|torch/autograd/(?:__init__|graph)",
        sources=r"\.backward\(",
        innermost=True,
    ),
    _Rule(
        "data",
        functions=r"(?:.*\.)?(?:\w*collat\w*|send_to_device|pin_memory\w*|_pin_memory_loop|_worker_loop"
        r"|batch_to_device|transfer_batch\w*|__getitem__|_process_data|_next_data"
        r"|_try_get_data|process_\w*data\w*|prepare_data\w*|preprocess\w*|tokenize\w*|_prepare_inputs?"
        r"|move_batch\w*|load_data\w*|get_batch)$",
        paths=r"torch/utils/data/|/datasets/|accelerate/data_loader|/dataloader",
        sources=r"(?:images?|inputs?|batch|labels?|targets?|data|x|y|v|samples?|imgs?)\.(?:to|cuda)\(",
    ),
    _Rule(
        "loss",
        functions=(
            r"(?:.*\.)?(?:cross_entropy\w*|(?:(?!compute)\w+_)?loss(?:_fn|_func|_function)?"
            r"|\w+Loss|criterion|nll_\w+|_?log_softmax|get_batch_logps|_get_per_token_logps\w*"
            r"|selective_log_softmax)$"
        ),
        paths=r"transformers/loss/|/losses?/|loss\w*\.py$|modules/loss",
        sources=(
            r"\blm_head\(|cross_entropy\(|\bcriterion\(|loss_f(?:unctio)?n\(|logits\.float\(\)"
            r"|log_softmax\("
        ),
    ),
)
_NAMED = (
    _Rule(
        "generate",
        paths=(
            r"(?i)(?:^|/)\w*(?:infer|generat|demo|webui|gradio|chat|sampl|predict|serve)\w*\.py$"
            r"|/comfy/|/vae|/ldm/|whisper|\btts\b"
        ),
    ),
    _Rule(
        "eval",
        paths=r"(?i)(?:^|/)(?:\w+_)?(?:eval|evaluate|evaluation|test|validate|val|benchmark)(?:_\w+)?\.py$",
    ),
    _Rule(
        "data",
        paths=(
            r"/pandas/|/pyarrow/|/polars/|/h5py/|(?i:(?:^|/)(?:\w*_)?data(?:set|sets|loader|module"
            r"|_\w+)?\.py$)|(?i:/data(?:sets?|loaders?)?/)"
        ),
    ),
)
"""What a script is called after, where nothing in its frames says more."""
_FORWARD = _Rule(
    "forward",
    functions=r"(?:.*\.)?(?:\w*forward\w*|_call_impl|_wrapped_call_impl|__call__|_body|\w*attention\w*"
    r"|\w*attn\w*|sdpa\w*|apply_rotary\w*"
    r"|_compute_\w+|\w*einsum\w*|interpolate|training_step|compute_loss)$",
    paths=r"torchinductor|torch/(?:nn/(?:functional|modules/(?!module))|functional\.py|_tensor\.py"
    r"|_refs|_decomp|_ops"
    r"|fft|linalg|special|_dynamo|_inductor|fx/|utils/checkpoint)"
    r"|transformers/models/|/modeling_\w+\.py$|/(?:layers?|nets?|networks?|backbones?|modules)/"
    r"|torchvision/(?:models|ops)|/timm/|einops|xformers|flash_attn|/triton/"
    r"|tensorflow/|keras/|flax/|/(?:model|net|network|unet|resnet|transformer|encoder|decoder"
    r"|backbone)s?(?:_\w+)?\.py$",
)
_FAR = 600
"""Characters from the message beyond which words are about something else."""
_INSTALLED = re.compile(r"/(?:site|dist)-packages/")
_APPLY = re.compile(r"(?:.*\.)?(?:_apply|convert|cuda|to|<lambda>|half|float)$")
_WORDS: tuple[tuple[Phase, str], ...] = (
    ("backward", r"_execution_engine|\.backward\(|\bbackward\b|conv_grad|gradtape|反向传播"),
    ("optimizer", r"optimi[sz]er\.step|optim(?:izer)? step|optimizer states?\b|优化器"),
    (
        "save",
        (
            r"(?:while|when|during|before|at|on) (?:\w+ )?(?:sav(?:e|ing)|checkpointing)"
            r"|save_pretrained|保存"
        ),
    ),
    (
        "load",
        (
            r"loading (?:the )?(?:checkpoint|model|weights|shards|pipeline)|llama_model_load"
            r"|load_tensors|load(?:s|ed|ing)? (?:of )?(?:the |a |your )?(?:\w+ )?(?:model|weights"
            r"|checkpoint)\b"
            r"|from_pretrained|prepare_model_for|engine (?:startup|start|init)|(?:at|on|during) startup"
            r"|model load|unable to load|error loading|dll load|readiness|\binitializ|\bwarm-?up\b"
            r"|mem-fraction-static|加载模型|模型加载|加载|upload|while importing|model weights"
        ),
    ),
    ("eval", r"\bevaluat|validation|during eval|\binfer(?:ence|ring)?(?:\b|_)|推理|测试"),
    (
        "generate",
        (
            r"\bgenerat|llama_decode|\bdecod(?:e|ing)\b|\bprefill|\bsampling\b|\bprompt\b|\btts\b"
            r"|transcri|\bencoder\b|生成"
        ),
    ),
    (
        "loss",
        (
            r"comput\w{1,3} (?:the )?loss|loss ?计算|计算 ?loss|cross_entropy|lm_head"
            r"|logits.{0,24}(?:float|fp32|upcast)"
        ),
    ),
    ("data", r"dataloader|data loader|\bcollate|num_workers|preprocess"),
    (
        "forward",
        (
            r"forward pass|op_requires failed at|in forward|\bforward\b|running \w+ node|\bf\.(?:conv"
            r"|linear|layer_norm"
            r"|scaled_dot|softmax)|_conv_forward|前向"
        ),
    ),
)
_PLAIN_WORDS: tuple[tuple[Phase, str], ...] = (
    (
        "generate",
        (
            r"comfyui|stable diffusion|\bsdxl\b|\bflux\b|diffusers|webui|ksampler|\bvae\b|text-to-image"
            r"|image generation|error completing request|ollama|whisper|upscal|synthesi[sz]|\brender"
            r"|\bchat\b|\bserving\b"
        ),
    ),
    (
        "load",
        (
            r"\bload(?:s|ed|ing)?\b|\bstart(?:s|ed|ing)? up\b|\bboots?\b|model\.(?:to|cuda)\(|into (?:vram"
            r"|gpu memory)"
            r"|onto (?:the )?gpu|启动"
        ),
    ),
    ("loss", r"\blogits\b"),
    ("data", r"read_csv|\bpandas\b|parquet|load_dataset|tokeniz|data loading"),
    ("forward", r"\{\{node|\bop:\w|\bactivations?\b|\bconv(?:olution|\dd)\b"),
    ("backward", r"\bgradients\b"),
)
_GENERATIVE = (
    r"video|视频|\bllm\b|token|prompt|diffus|\bvae\b|llama|\bchat|vllm|gpt|qwen|max_new_tokens"
    r"|comfyui|text-to-|\btts\b"
)


def phase_of(finding: Finding) -> tuple[Phase, str | None]:
    """The phase and what showed it."""
    if finding.kind in _BY_KIND:
        return _BY_KIND[finding.kind], None
    if finding.frames:
        found = _from_frames(finding.frames)
        if found is not None:
            return found
    if finding.kind == "sglang_kv" and "mem-fraction-static" in finding.message.lower():
        return "load", None
    if finding.figures.allocated_bytes == 0 and finding.figures.total_bytes:
        return "load", "nothing had been allocated before"
    found = _from_words(finding)
    return found or (_UNLESS_SHOWN.get(finding.kind, "unknown"), None)


def _from_frames(frames: tuple[Frame, ...]) -> tuple[Phase, str] | None:
    """A surrounding phase, else the innermost stage, else a forward pass."""
    inner = list(reversed(frames))
    for rule in _SURROUNDING[2:]:
        if hit := _first(rule, inner):
            return hit
    hit = _moving_a_module(inner) or _first(_LOADING, inner)
    if hit and not any(_first(rule, inner) for rule in _STAGES[:2]):
        return hit
    for rule in _SURROUNDING[:2]:
        if hit := _first(rule, inner):
            return hit
    for index in range(len(inner)):
        for rule in _STAGES:
            if _shows(rule, inner, index):
                return rule.phase, _shown(inner[index])
    own = [frame for frame in inner if not _INSTALLED.search(_path(frame))]
    for rule in _NAMED:
        if hit := _first(rule, own):
            return hit
    hit = _first(_FORWARD, inner)
    if hit and any(frame.function == "decorate_context" for frame in inner):
        # under `torch.no_grad` nothing is trained
        paths = " ".join(_path(frame) for frame in inner).lower()
        return ("generate" if compiled(_GENERATIVE).search(paths) else "eval"), hit[1]
    return hit


def _moving_a_module(inner: list[Frame]) -> tuple[Phase, str] | None:
    """`Module._apply` below `to` or `cuda`: the model goes to the card."""
    if inner and "nn/modules/module" in _path(inner[0]) and _APPLY.match(inner[0].function):
        return "load", _shown(inner[0])
    return None


def _first(rule: _Rule, inner: list[Frame]) -> tuple[Phase, str] | None:
    for index, frame in enumerate(inner):
        if _shows(rule, inner, index):
            return rule.phase, _shown(frame)
    return None


def _shows(rule: _Rule, inner: list[Frame], index: int) -> bool:
    frame = inner[index]
    if compiled(rule.functions).match(frame.function) or compiled(rule.paths).search(_path(frame)):
        return True
    if not frame.source or not compiled(rule.sources).search(frame.source):
        return False
    return index == 0 or (not rule.innermost and all("/torch/" in _path(below) for below in inner[:index]))


def _path(frame: Frame) -> str:
    return frame.path.replace("\\", "/")


def _shown(frame: Frame) -> str:
    name = _path(frame).rpartition("/")[2]
    return f"{frame.function} in {name}" if frame.function else name


def _from_words(finding: Finding) -> tuple[Phase, str] | None:
    """The phase that the words nearest to the message speak of; plain ones where telling ones are absent."""
    around = finding.around.lower()
    middle = max(0, around.find(finding.message[:40].lower()))
    for table in (_WORDS, _PLAIN_WORDS):
        near: list[tuple[int, Phase, str]] = []
        for phase, pattern in table:
            found = islice(compiled(pattern).finditer(around), 16)
            near += [(abs(match.start() - middle), phase, match[0]) for match in found]
        distance, phase, words = min(near, default=(_FAR, "unknown", ""))
        if distance < _FAR:
            if phase == "eval" and "infer" in words and compiled(_GENERATIVE).search(around):
                phase = "generate"
            return phase, f"the text around it says “{words}”"
    return None
