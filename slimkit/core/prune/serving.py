"""What other programs state they can serve, checked against a cut model's configuration. Nothing of it was tried here.

Every limit stands with where it is stated; versions change, and the source is what holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.core.prune.attributes import Field

VLLM = "https://github.com/vllm-project/vllm/blob/main/vllm/"
ASCEND = "https://docs.vllm.ai/projects/ascend/en/latest/user_guide/support_matrix/supported_models.html"
SOURCES = {
    "architectures": VLLM + "model_executor/models/registry.py",
    "heads": VLLM + "config/model.py (ModelConfig.verify_with_parallel_config)",
    "key and value heads": VLLM + "model_executor/models/llama.py (LlamaAttention)",
    "inner width": VLLM + "distributed/utils.py (ensure_divisibility)",
    "head size": VLLM + "v1/attention/backends/flash_attn.py (get_supported_head_sizes)",
}

# Classes of transformers in vLLM's registry that the pruner knows how to cut.
_IN_VLLM = {
    "BertForSequenceClassification", "BertForTokenClassification", "BertModel", "BloomForCausalLM", "CLIPModel",
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "FalconForCausalLM", "Gemma2ForCausalLM", "Gemma2Model",
    "Gemma3ForCausalLM", "GemmaForCausalLM", "GPT2ForSequenceClassification", "GPT2LMHeadModel", "GPTJForCausalLM",
    "GPTNeoXForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "LlamaModel", "MambaForCausalLM",
    "MistralForCausalLM", "MistralModel", "MixtralForCausalLM", "ModernBertForSequenceClassification",
    "ModernBertModel", "MptForCausalLM", "Olmo2ForCausalLM", "OlmoForCausalLM", "OlmoeForCausalLM",
    "OPTForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2Model", "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "RobertaForMaskedLM", "RobertaForSequenceClassification",
    "RobertaModel", "StableLmForCausalLM", "Starcoder2ForCausalLM", "XLMRobertaForSequenceClassification",
    "XLMRobertaModel",
}  # fmt: skip
# What FlashAttention takes in vLLM; its slower FlexAttention takes every head size.
_HEAD_SIZES = (32, 64, 96, 128, 160, 192, 224, 256)

# Fields that configurations have for the number of heads, of key and value heads, and for inner widths.
_QUERIES = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
_SHARED = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_INNER = (
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "d_ff", "encoder_ffn_dim",
    "shared_expert_intermediate_size", "decoder_ffn_dim",
)  # fmt: skip

# Class -> (row of vLLM-Ascend's table, what the table says)
_IN_ASCEND = {
    "BertModel": ("Bert", "experimental"),
    "DeepseekV3ForCausalLM": ("DeepSeek V3/3.1", "supported"),
    "Gemma2ForCausalLM": ("Gemma-2", "experimental"),
    "Gemma3ForCausalLM": ("Gemma-3", "experimental"),
    "LlamaForCausalLM": ("Llama2/3/3.1/3.2", "supported"),
    "MistralForCausalLM": ("Mistral/Mistral-Instruct", "experimental"),
    "Phi3ForCausalLM": ("Phi-3/4", "experimental"),
    "Qwen2ForCausalLM": ("Qwen2, Qwen2.5", "supported"),
    "Qwen3ForCausalLM": ("Qwen3-Dense", "supported"),
    "Qwen3MoeForCausalLM": ("Qwen3-30B-A3B", "supported"),
    "WhisperForConditionalGeneration": ("Whisper", "not supported"),
    "XLMRobertaModel": ("XLM-RoBERTa-based", "experimental"),
}


def serves(kind: str, fields: Mapping[str, Field], mismatch: str, parallel: int = 1) -> dict[str, Any]:
    """Whether a model's configuration keeps to what transformers, vLLM and vLLM-Ascend state.

    Args:
        kind: the model's class.
        fields: numbers of its configuration.
        mismatch: where the configuration does not say the model's shapes; "" where it does.
        parallel: devices that share the model.

    Returns:
        program -> {"meets": bool, "because": what it does not keep to, "sources": where that is stated}.

    Example:
        >>> found = serves("LlamaForCausalLM", {"hidden_size": 64, "num_attention_heads": 6, "head_dim": 64}, "", 4)
        >>> found["vllm"]["because"]
        ['6 heads do not divide among 4 devices']
    """
    vllm = [f"the configuration does not say the shapes: {mismatch}"] if mismatch else []
    if kind not in _IN_VLLM:
        vllm.append(f"{kind} is not among the classes that slimkit knows in its registry")
    for tower in _towers(fields):
        vllm += _divided(tower, parallel)
        size = _head_size(tower)
        if size and size not in _HEAD_SIZES:
            vllm.append(f"FlashAttention takes no heads of {size} (FlexAttention does)")
    vllm = list(dict.fromkeys(vllm))
    row, status = _IN_ASCEND.get(kind, ("", ""))
    ascend = list(vllm)
    if status != "supported":
        ascend.append(f"its table says of {row}: {status}" if row else f"its table does not name {kind}")
    loads = {"meets": not mismatch, "because": [mismatch] if mismatch else [], "sources": ["built from config.json"]}
    return {
        "transformers": loads,
        "vllm": {"meets": not vllm, "because": vllm, "sources": list(SOURCES.values())},
        "vllm_ascend": {"meets": not ascend, "because": ascend, "sources": [ASCEND, *SOURCES.values()]},
    }


def _head_size(fields: Mapping[str, Field]) -> int:
    told = _number(fields, "head_dim", "d_kv")
    heads = _number(fields, *_QUERIES)
    return told or (_number(fields, "hidden_size", "n_embd", "d_model") // heads if heads else 0)


def _number(fields: Mapping[str, Field], *names: str) -> int:
    return next((v for n in names if type(v := fields.get(n)) is int), 0)


def _towers(fields: Mapping[str, Field]) -> list[dict[str, Field]]:
    """The fields of a configuration and of each of those inside it, by their own names."""
    found: dict[str, dict[str, Field]] = {}
    for path, value in fields.items():
        inside, _, name = path.rpartition(".")
        found.setdefault(inside, {})[name] = value
    return list(found.values())


def _divided(fields: Mapping[str, Field], parallel: int) -> list[str]:
    out = []
    for name in _QUERIES:
        heads = _number(fields, name)
        if heads % parallel:
            out.append(f"{heads} heads do not divide among {parallel} devices")
    for name in _SHARED:
        shared = _number(fields, name)
        if shared and shared % parallel and parallel % shared:
            out.append(f"{shared} key and value heads neither divide among {parallel} devices nor are shared evenly")
    inner = [_number(fields, name) for name in _INNER]
    if "n_inner" in fields and fields["n_inner"] is None:
        inner.append(4 * _number(fields, "n_embd", "hidden_size"))  # what GPT-2's means where it is unset
    out += [f"an inner width of {n} does not divide among {parallel} devices" for n in inner if n % parallel]
    return out
