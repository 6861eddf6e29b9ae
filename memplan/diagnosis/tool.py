"""Which tool a failure happened in: its options are the ones that a fix is written in."""

from __future__ import annotations

from memplan.diagnosis.types import Finding
from memplan.diagnosis.wordings import compiled

_TOOLS: tuple[tuple[str, str], ...] = (
    ("axolotl", r"/axolotl/|\baxolotl\b"),
    ("llamafactory", r"/llama-?factory/|/llmtuner/|\bllamafactory(?:-cli)?\b|\bllama[- ]factory\b"),
    ("deepke", r"/deepke/|\bdeepke\b"),
    ("unsloth", r"/unsloth(?:_zoo)?/|\bunsloth\b"),
    ("comfyui", r"/comfyui/|\bcomfyui\b"),
    ("trl", r"/trl/(?:trainer|scripts|models)|\bsfttrainer\b|\bgrpotrainer\b|\bdpotrainer\b"),
    ("vllm", r"/vllm/|\bvllm\b"),
    ("sglang", r"/sglang/|\bsglang\b"),
    ("pytorch-lightning", r"/(?:pytorch_)?lightning/"),
    ("deepspeed", r"/deepspeed/|\bdeepspeed\b"),
    ("diffusers", r"/diffusers/|\bdiffusers\b"),
    ("transformers", r"/transformers/|\btransformers\b|automodelfor|from_pretrained"),
    ("accelerate", r"/accelerate/|\baccelerate (?:launch|config)\b"),
    ("peft", r"/peft/"),
)
_ITS_OWN = frozenset({"pytorch", "cuda", "python"})
"""Frameworks that a more telling name may stand for."""


def tool_of(finding: Finding) -> str:
    """The tool nearest to the user among those in the frames, else in the words around, else the library."""
    if finding.framework not in _ITS_OWN:
        return finding.framework
    paths = "\n".join(frame.path for frame in finding.frames).lower().replace("\\", "/")
    for text in (paths, finding.around.lower()):
        for name, pattern in _TOOLS:
            if compiled(pattern).search(text):
                return name
    return finding.framework
