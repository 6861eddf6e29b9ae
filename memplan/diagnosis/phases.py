"""When it happened, from the frames of the traceback, else from the words around the message."""

from __future__ import annotations

import re
from dataclasses import dataclass

from memplan.diagnosis.types import Event, Phase

_FRAMES = (
    re.compile(r'File "([^"\n]{1,400})", line \d{1,7}(?:, in ([^\s(]{1,200}))?'),  # Python
    re.compile(r"File ([^\s:,]{1,400}):\d{1,7}, in ([^\s(]{1,200})\("),  # IPython 8
    re.compile(r"^\s{0,8}(\S{1,400}?\.py|<[^>\n]{1,80}>|/tmp/\S{1,300})(?::\d{1,7})? in ([^\s(]{1,200})"),
    re.compile(r"^\s{0,8}(/\S{1,400}\.py|\S{1,400}\.py):\d{1,7} in ([^\s(]{1,200})"),  # Rich
)  # fmt: skip
_START = "Traceback (most recent call last)"
_CHAINED = re.compile(r"direct cause of the following exception|During handling of the above exception")
_FARTHEST = 400


@dataclass(frozen=True)
class Told:
    """A phase, and what tells it; `frames` are those of the traceback, the innermost last."""

    phase: Phase
    evidence: str
    frames: tuple[str, ...] = ()


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


# A frame reads `path function`. Rules are asked in this order; a later frame is an inner one.
_RULES: tuple[tuple[Phase, re.Pattern[str]], ...] = (
    ("load", _words(r" (?:profile_run|determine_\w*available\w*|_?initialize_kv_caches?|capture_model|_dummy_run|init_device|warm_?up\w*|init_memory_pool|profile_max_num_token|capture_cuda_graphs?|capture)$")),
    ("save", _words(r" (?:save_pretrained|save_model|_?save_checkpoint|save_state|_save|_save_to_state_dict|state_dict|get_state_dict|\w*full_state_dict\w*|merge_and_unload|_unload_and_optionally_merge|save_16bit_model|_consolidated_16bit_state_dict|_zero3_consolidated\w*|save_file|save_adapter)$|torch/serialization\.py (?:save|_save)$")),
    ("generate", _words(r"(?:generation/|text_generation)\S* |diffusers/\S*pipelines?/\S* __call__| (?:generate|_generate|_sample|sample|greedy_search|beam_search|_beam_search|_prefill|prefill|execute_model|execute_method|forward_extend|forward_decode|run_batch|infer|inference|predict|generate_\w{1,40}|\w{1,40}_generate|decode_latents|chat|stream_chat|llama_decode|_generate_\w{1,40}|vae_decode|tiled_decode|decode_first_stage|_select_prefill|_\w{0,30}prefill)$|transformers/pipelines/")),
    ("eval", _words(r" (?:evaluate|_evaluate|evaluation_loop|prediction_step|prediction_loop|eval|validate|_?validat\w{1,40}|test_step|test_epoch|test|eval_\w{1,60}|\w{1,60}_eval|evaluate_\w{1,60}|_run_evaluation|run_eval\w{0,40}|_run_validation|val_\w{0,40}|\w{1,60}_evaluat\w{1,10})$")),
    ("backward", _words(r"torch/autograd/(?:__init__|function|graph)\.py| (?:_?backward|_?run_backward|_engine_run_backward|\w{0,40}_backward|recompute_fn|unpack_hook|reduce_\w{0,40}grads?\w{0,20})$")),
    ("optimizer", _words(r"torch/optim/\S* (?!__init__|zero_grad|wrapper)|bitsandbytes/optim\S* (?!__init__)|apex/optimizers\S* step| (?:optimizer_step|_take_model_step|unscale_\w{0,20}|clip_grad_norm_?|_optimizer_step|init_state|step_optimizer)$|deepspeed/runtime/\S* (?:step|_optimizer_step|sub_group_step)$|accelerate/optimizer\.py step")),
    ("data", _words(r"utils/data/\S* |collat\w{0,30}| (?:_prepare_inputs?|pin_memory|__getitem__|send_to_device|\w{0,30}to_device|prepare_batch|\w{0,30}_?dataset\w{0,30}|get_batch|tokenize\w{0,30})$|datasets/\S* |pandas/\S* |h5py/")),
    ("loss", _words(r" (?:cross_entropy|fixed_cross_entropy|ForCausalLMLoss|\w{0,40}_?loss_function|nll_loss|log_softmax|logsumexp|kl_div|binary_cross_entropy\w{0,20}|selective_log_softmax|\w{0,30}entropy_from_logits|get_batch_logps|_get_\w{0,20}logps\w{0,20}|ForMaskedLM\w{0,10}|logprobs_from_logits|concatenated_forward)$|modules/loss\.py|loss/loss_\w{1,30}\.py|losses?\.py (?:forward|__call__)|liger_kernel/\S*(?:loss|entropy)")),
    ("load", _words(r" (?:__init__|_?from_(?:pretrained|config|checkpoint|ckpt)|load_\w{1,60}|_load_\w{1,60}|\w{0,40}load_(?:model|weights|pipeline|state_dict)\w{0,30}|_apply|convert|cuda|to_empty|_materialize_copy|prepare|_prepare_\w{1,30}|prepare_\w{1,40}|_init_flat_param\w{0,30}|fully_shard|get_peft_model|init_weights|_init_weights|\w{0,20}(?:create|build|get|init|setup|make)_\w{0,20}model\w{0,20}|initialize|init_model\w{0,20}|resize_token_embeddings|_get_resized_embeddings|set_module_tensor_to_device|\w{0,30}move\w{0,30}(?:model|device)\w{0,30}|dispatch_model|empty_init|from_single_file|from_quantized|load|restore|_configure_\w{1,40}|create_weights|quantize\w{0,20}|create_quantized_param|caching_allocator_warmup|_move_model_to_device|setup_model\w{0,30}|post_init|init_worker\w{0,20})$|core_model_loading\.py|torch/serialization\.py|modeling_utils\.py (?!forward)|fsdp/\S* (?:__init__|_\w{0,40}init\w{0,40})|nn/parallel/distributed\.py __init__|nn/modules/module\.py to$|bitsandbytes/nn/modules\.py (?:cuda|to|_quantize)")),
    ("forward", _words(r" (?:forward|_?call_impl|_wrapped_call_impl|_conv_forward|training_step|compute_loss|call|inner|linear|layer_norm|conv\dd|scaled_dot_product_attention|multi_head_attention_forward|softmax|repeat_kv|\w{0,40}_forward|forward_\w{1,40}|encode|embed\w{0,20})$|torch/nn/functional\.py|torchinductor|modeling_\w{1,60}\.py")),
)  # fmt: skip
_INNERMOST = {"save", "generate", "eval", "load"}
"""Phases that contain others' frames or are contained: the inner one of these tells."""
_NOT_EVAL = re.compile(r"eval_frame|torch/_dynamo|/unittest/")
_CLOSURE = re.compile(r" (?:\w{0,20}closure\w{0,20})$")

_SOURCE: tuple[tuple[Phase, re.Pattern[str]], ...] = (
    ("backward", _words(r"\.backward\(")),
    ("optimizer", _words(r"\b(?:optim\w{0,20}|scaler|opt)\.step\(")),
    ("generate", _words(r"\.generate\(")),
    ("save", _words(r"\.save_pretrained\(|torch\.save\(|\.save_model\(|\.save_checkpoint\(")),
    ("loss", _words(r"cross_entropy\(|log_softmax\(|loss_fct\(|criterion\(|logits(?:\.\w{1,20})?\.float\(\)|= self\.lm_head\(")),
    ("load", _words(r"from_pretrained\(|model\w{0,20}\.(?:to|cuda)\(|load_state_dict\(|\.prepare\(|load_checkpoint\(")),
    ("data", _words(r"(?:batch|inputs?|data|images?|x|labels)\w{0,20}\.(?:to|cuda)\(")),
)  # fmt: skip
_PROSE: tuple[tuple[Phase, re.Pattern[str]], ...] = (
    ("load", _words(r"(?i)determine_available_memory|profile_run|llama_init_from_model|llama_model_load|during (?:model |engine )?(?:load|init|start)\w{0,20}|load(?:ing)? (?:the |of the )?(?:\w{1,20} )?(?:model|checkpoint|weights|pipeline|safetensors)|model load|weight loading|checkpoint shards|from_pretrained|load_model|loading model|模型加载|加载模型|加载|모델 로드|model\.to\(|\.to\(['\"]?(?:cuda|device)|initiali[sz]\w{1,6} (?:the )?(?:model|engine)|(?:engine|server) (?:start|init)\w{0,6}|startup|cold start|boot(?:ed|ing|s)?\b|param\.data\.to")),
    ("optimizer", _words(r"(?i)optimi[sz]er(?:\.| )step|optim step|during optimizer|adam(?:w)? states?")),
    ("backward", _words(r"(?i)\bbackward\b|_grad_\w{1,30}ops?\.cc|反向传播|loss\.backward")),
    ("eval", _words(r"(?i)\b(?:during|in|at|the) (?:eval\w{0,8}|validation)|\bevaluation\b(?!_)|\bvalidation\b|\binfer\.py|batch \[\d{1,6}/\d{1,6}\]|验证|评估")),
    ("save", _words(r"(?i)\bsav(?:e|ing) (?:the )?(?:model|checkpoint|adapter)|checkpoint sav|merge_and_unload|保存")),
    ("loss", _words(r"(?i)loss.{0,60}logits|logits.{0,60}(?:loss|float|fp32|upcast)|cross.?entropy|log.?softmax")),
    ("generate", _words(r"(?i)\bgenerat(?:e|es|ed|ing|ion)\b|\binference\b|\bprefill|\bdecod(?:e|ing)\b|\bprompts?\b|推理|生成|知识库|推論|llama_decode|image size|resolution|completing request")),
    ("data", _words(r"(?i)data ?loader|dataset|collat|preprocess|\bbatch(?:es)? to (?:the )?(?:gpu|device|cuda)|tokeni[sz]")),
    ("forward", _words(r"(?i)\bforward\b|\bactivations?\b|前向|running \w{1,20} node|_ops\.cc")),
)  # fmt: skip
_ADVICE = re.compile(
    r"If reserved .*|See documentation .*|Compile with .*|For debugging .*|CUDA kernel errors .*"
)
_PROGRESS = re.compile(r"Loading (?:checkpoint shards|weights|pipeline components|safetensors)\b")
_ENGINES = re.compile(
    r"(?i)/(?:vllm|sglang|diffusers|text_generation_server|comfyui|whisper|ctranslate2|tts|lmdeploy|exllama\w{0,3})\b[^ ]*"
)
"""Code that only ever infers: what is not loading there is generating."""
_NO_GRAD = " decorate_context"
_ALWAYS: dict[str, tuple[Phase, str]] = {
    "vllm_kv": ("load", "the engine sizes its cache while it starts"),
    "sglang_kv": ("load", "the engine sizes its cache while it starts"),
    "load_dispatch": ("load", "placement is decided while the model loads"),
    "shm": ("data", "loader workers hand batches over through shared memory"),
}


def phase_of(event: Event, before: list[str], after: list[str]) -> Told:
    """The phase of an event; `before` and `after` are the lines around its message."""
    if event.kind in _ALWAYS:
        phase, why = _ALWAYS[event.kind]
        return Told(phase, why)
    if event.figures.allocated_bytes == 0 and event.kind == "cuda_oom":
        return Told("load", "nothing had been allocated yet", tuple(_frames(_traceback(before))))
    if event.kind == "host_oom" and (bar := _progress([*before[-15:], event.message])):
        return Told("load", f"the progress bar `{bar}` stands before it")
    trace = _traceback(before)
    frames = tuple(_frames(trace))
    if (told := _from_frames(frames)) is not None:
        return told
    if frames and (told := _from_source(trace, frames)) is not None:
        return told
    return _from_prose(before, event.message, after, frames)


def _traceback(before: list[str]) -> list[str]:
    """The lines of the traceback that ends here, with those that it is chained to."""
    lines = before[-_FARTHEST:]
    start = 0
    for index in range(len(lines) - 1, -1, -1):
        if _START in lines[index]:
            start = index
            earlier = " ".join(lines[max(index - 4, 0) : index])
            if not _CHAINED.search(earlier):
                break
    return lines[start:]


def _frames(lines: list[str]) -> list[str]:
    frames = []
    for line in lines:
        for pattern in _FRAMES:
            match = pattern.search(line[:1000])
            if match is not None:
                path = match[1].replace("\\", "/")
                frames.append(f"{path} {(match[2] or '<module>').rpartition('.')[2]}")
                break
    return frames


def _from_frames(frames: tuple[str, ...]) -> Told | None:
    depths: dict[tuple[Phase, int], int] = {}
    for rule, (phase, pattern) in enumerate(_RULES):
        for depth, frame in enumerate(frames):
            if pattern.search(frame) and not (phase == "eval" and _NOT_EVAL.search(frame)):
                depths[phase, rule] = depth
    if not depths:
        return None
    if any(_CLOSURE.search(frame) for frame in frames):  # Lightning runs forward and backward inside the step
        depths = {key: depth for key, depth in depths.items() if key[0] != "optimizer"} or depths
    order = list(depths)
    chosen = order[0]
    if chosen[0] in _INNERMOST:
        chosen = max((key for key in order if key[0] in _INNERMOST), key=lambda key: depths[key])
        if chosen[0] == "load" and chosen[1] != 0:
            chosen = _inside_a_load(depths, chosen, order[0])
    if chosen[0] in ("forward", "loss") and (_infers(frames)):
        engine = next((frame for frame in frames if _ENGINES.search(frame)), frames[0])
        return Told("generate", f"forward without gradients: the traceback passes {_shown(engine)}", frames)
    return Told(chosen[0], f"the traceback passes {_shown(frames[depths[chosen]])}", frames)


def _infers(frames: tuple[str, ...]) -> bool:
    return any(_NO_GRAD in frame or _ENGINES.search(frame) for frame in frames)


def _progress(lines: list[str]) -> str | None:
    match = next((m for line in reversed(lines) if (m := _PROGRESS.search(line[-1000:]))), None)
    return match[0] if match else None


def _inside_a_load(
    depths: dict[tuple[Phase, int], int], load: tuple[Phase, int], first: tuple[Phase, int]
) -> tuple[Phase, int]:
    """Generic names of loading (`convert`, `prepare_…`) count only where no forward runs inside them."""
    inner = [key for key in depths if key[0] in ("forward", "loss") and depths[key] > depths[load]]
    return first if inner and first != load else load


def _from_source(trace: list[str], frames: tuple[str, ...]) -> Told | None:
    for line in reversed(trace):
        for phase, pattern in _SOURCE:
            if pattern.search(line[:400]):
                return Told(phase, f"the traceback shows `{_clipped(line.strip())}`", frames)
    return None


def _from_prose(before: list[str], message: str, after: list[str], frames: tuple[str, ...]) -> Told:
    for line in (_ADVICE.sub("", message[:1500]), *reversed(before[-12:]), *after[:6]):
        for phase, pattern in _PROSE:
            if (match := pattern.search(line[-1500:])) is not None:
                return Told(phase, f"the text beside the message says `{_clipped(match[0])}`", frames)
    return Told("unknown", "", frames)


def _shown(frame: str) -> str:
    path, _, function = frame.rpartition(" ")
    return f"`{'/'.join(path.split('/')[-2:])}` in `{function}`"


def _clipped(text: str) -> str:
    text = text.replace("`", "'")
    return text if len(text) <= 80 else text[:79] + "…"
