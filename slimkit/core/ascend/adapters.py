"""What vLLM-Ascend, MindIE and MindSpeed say that they take of a LoRA adapter: each rule with its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from slimkit.core import check, files
from slimkit.core.ascend.findings import Check, Finding, in_order
from slimkit.core.checkpoint.openweights import base_config
from slimkit.core.checkpoint.weightfile import Entry, Safetensors
from slimkit.core.delta.peft import CONFIG, ROOT, TENSORS, refuse_bundle
from slimkit.core.errors import FileFormatError

FORMAT = "slimkit-adapter-check"
VERSION = 1

# Read on 1 December 2026.
_VLLM = "https://github.com/vllm-project/vllm/blob"
_ASCEND = "https://github.com/vllm-project/vllm-ascend/blob"
SOURCES = {
    "features": f"{_VLLM}/e745bafffc44744aa601169f8c6f325e47ca7cd5/vllm/lora/peft_helper.py",
    "ranks": f"{_VLLM}/a78dc92f43ae2471dd40675a47079aa1a9a157c1/vllm/config/lora.py",
    "modules": f"{_VLLM}/532cc2581840104cf00297b7ea6a187420456403/vllm/lora/lora_model.py",
    "kernel": f"{_ASCEND}/0750d3f132c172e12973a8622783d91b176c594a/csrc/kernels/bgmv_expand.cpp",
    "types": f"{_ASCEND}/05968dc974017a0f28762e479c85a0fe626b179b/csrc/kernels/bgmv_shrink.cpp",
    "heads": "https://github.com/vllm-project/vllm/issues/11797",
    "mixtures": "https://docs.vllm.ai/projects/ascend/en/latest/user_guide/feature_guide/lora.html",
    "mindie": "https://www.hiascend.com/document/detail/zh/mindie/230/mindiellm/llmdev/mindie_llm0298.html",
    "mindie-fp16": "https://www.hiascend.com/document/detail/zh/mindie/20RC1/mindiellm/llmdev/mindie_llm0298.html",
}
# What bgmv_expand has a branch for.
KERNEL_RANKS = (8, 16, 32, 64)
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_TABLES = ("embed_tokens", "lm_head")
# Families that MindIE 2.3 names, by Hugging Face's model_type.
_MINDIE_FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, repr=False)
class AdapterCheck(Check):
    """What `check_adapter` found.

    Args:
        folder: the adapter.
        target: who is to serve it.
        rank: the largest rank in the file.
        max_lora_rank: what vLLM-Ascend must be told, or None where it takes none that large.
        findings: errors first.
    """

    rules = (
        "feature", "scale", "rank", "dtype", "modules", "experts", "tensor-parallel", "name", "model", "quantised",
    )  # fmt: skip

    folder: str
    target: str
    rank: int
    max_lora_rank: int | None
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with a format and a version."""
        plain = {**vars(self), "findings": [asdict(f) for f in self.findings]}
        return {"format": FORMAT, "version": VERSION, **plain, "exit_code": self.exit_code, "counts": self.counts()}


@dataclass(frozen=True)
class _Adapter:
    config: Mapping[str, Any]
    ranks: Mapping[str, int]  # path -> rows of a
    entries: Mapping[str, Entry]
    base: Mapping[str, Any]
    tensor_parallel: int
    folder_name: str

    @property
    def rank(self) -> int:
        return max(self.ranks.values(), default=0)


def check_adapter(
    directory: files.PathLike,
    target: str = "vllm-ascend",
    *,
    config: Mapping[str, Any] | files.PathLike | None = None,
    tensor_parallel: int = 1,
) -> AdapterCheck:
    """Compare a PEFT LoRA adapter with what a server on Ascend says that it takes; no device and no server is needed.

    Args:
        directory: PEFT's folder; `convert_adapter` makes one of MindFormers' or Megatron's files.
        target: "vllm-ascend", "mindie-a2" (800I A2 and A3) or "mindie-300i-duo".
        config: of the base, a dict or a Hugging Face folder; without it nothing is said of heads and model types.
        tensor_parallel: over how many devices the base is cut.

    Returns:
        The findings, each with the document or source that it rests on.

    Raises:
        ArgumentError: an unknown target.
        FileFormatError: the folder holds no readable adapter.

    Example:
        >>> check_adapter("lora", "vllm-ascend", config="llama", tensor_parallel=4).findings  # doctest: +SKIP
        (Finding(severity='error', rule='rank', node='', message='rank 128 ...', ...),)
    """
    check.choice(target, RULES, "target")
    check.positive(tensor_parallel, "tensor_parallel")
    folder = files.as_path(directory, "directory")
    refuse_bundle(folder)
    said = files.read_json(folder / CONFIG, CONFIG)
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        raise FileFormatError(f"{folder / CONFIG} must be the configuration of a LoRA adapter of PEFT.")
    with Safetensors(files.readable_file(folder / TENSORS, TENSORS)) as weights:
        entries = dict(weights.entries)
    ranks = {
        name.removeprefix(ROOT).partition(".lora_")[0]: entry.shape[0]
        for name, entry in entries.items()
        if ".lora_A" in name or ".lora_embedding_A" in name
    }
    adapter = _Adapter(said, ranks, entries, base_config(config), tensor_parallel, folder.resolve().name)
    found = tuple(one for rule in RULES[target] for one in rule(adapter))
    told = next((n for n in KERNEL_RANKS if n >= adapter.rank), None) if target == "vllm-ascend" else None
    return AdapterCheck(str(folder), target, adapter.rank, told, in_order(found))


def _features(a: _Adapter) -> Iterator[Finding]:
    for option, why in (("use_dora", "DoRA"), ("modules_to_save", "modules trained whole (modules_to_save)")):
        if a.config.get(option):
            yield Finding(
                "error", "feature", "", f"{why}: vLLM refuses it",
                "merge it into the base (merge_delta) and serve that", SOURCES["features"],
            )  # fmt: skip
    if a.config.get("bias", "none") != "none" or a.config.get("lora_bias"):
        yield Finding(
            "error", "feature", "", "trained biases: vLLM refuses them", "merge it into the base and serve that",
            SOURCES["features"],
        )  # fmt: skip


def _one_scale(a: _Adapter) -> Iterator[Finding]:
    # The helper keeps r and lora_alpha of the configuration, and no pattern: one scale for all layers.
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if a.config.get(name)]
    if patterns or len(set(a.ranks.values())) > 1:
        yield Finding(
            "error", "scale", next(iter(a.ranks), ""),
            f"ranks or scales differ between layers ({', '.join(patterns) or 'in the file'}); vLLM scales all by "
            "lora_alpha / r of the configuration",
            "combine_delta(model, [name], method='svd', rank=...) makes one rank and scale of them; or merge it",
            SOURCES["features"],
        )  # fmt: skip


def _kernel_rank(a: _Adapter) -> Iterator[Finding]:
    if a.rank > KERNEL_RANKS[-1]:
        yield Finding(
            "error", "rank", "", f"rank {a.rank}; the kernel of vLLM-Ascend computes {KERNEL_RANKS[-1]} at most",
            "cut it: combine_delta(model, [name], method='svd', rank=64)", SOURCES["kernel"],
        )  # fmt: skip
        return
    told = next(n for n in KERNEL_RANKS if n >= a.rank)
    yield Finding(
        "info", "rank", "", f"serve it with --max-lora-rank {told}: vLLM's own default is 16, and takes no others than "
        "1, 8, 16, 32, 64 and larger", "", SOURCES["ranks"],
    )  # fmt: skip


def _kernel_types(a: _Adapter) -> Iterator[Finding]:
    wide = sorted({e.dtype for e in a.entries.values()} - {"F16", "BF16"})
    if wide:
        yield Finding(
            "info", "dtype", "", f"values of type {', '.join(wide)}; the kernels are for float16 and bfloat16, and "
            "vLLM turns an adapter into the base's type", "", SOURCES["types"],
        )  # fmt: skip


def _vllm_modules(a: _Adapter) -> Iterator[Finding]:
    for path in a.ranks:
        last = path.rpartition(".")[2]
        if last in _TABLES:
            yield Finding(
                "warning", "modules", path, f"{path} is a table; vLLM refuses modules that the model does not name as "
                "its own for LoRA", "see that the served model names it, or train without it", SOURCES["modules"],
            )  # fmt: skip
        elif last not in _LINEAR:
            yield Finding(
                "warning", "modules", path, f"{path}: vLLM refuses modules that the model does not name as its own for "
                "LoRA", "", SOURCES["modules"],
            )  # fmt: skip
    if any(".experts." in path for path in a.ranks):
        yield Finding(
            "warning", "experts", "", "a LoRA on experts: dense tensor and expert parallelism without quantisation, or "
            "W8A8 dynamic, are what the guide lists", "", SOURCES["mixtures"],
        )  # fmt: skip


def _heads(a: _Adapter) -> Iterator[Finding]:
    for key in ("num_attention_heads", "num_key_value_heads"):
        count = a.base.get(key)
        if not isinstance(count, int) or a.tensor_parallel == 1:
            continue
        fits = count % a.tensor_parallel == 0
        # Fewer key-value heads than devices are held by several.
        if key == "num_key_value_heads" and count < a.tensor_parallel:
            fits = a.tensor_parallel % count == 0
        if not fits:
            yield Finding(
                "error", "tensor-parallel", "", f"{key} is {count}, which {a.tensor_parallel} devices do not divide",
                "choose another number of devices", SOURCES["heads"],
            )  # fmt: skip


def _mindie(a: _Adapter) -> Iterator[Finding]:
    url = SOURCES["mindie"]
    odd = [n for n in a.entries if not (n.startswith(ROOT) and n.endswith((".lora_A.weight", ".lora_B.weight")))]
    if odd:
        yield Finding(
            "error", "modules", odd[0], f"{len(odd)} tensors that are no factors of linear layers; MindIE takes LoRA "
            "on linear layers, by keys that end in lora_A.weight and lora_B.weight", "merge it into the base", url,
        )  # fmt: skip
    if len(a.folder_name) > 256:
        yield Finding("error", "name", "", "the adapter's name is longer than 256 letters", "rename the folder", url)
    kind = a.base.get("model_type")
    if kind is not None and kind not in _MINDIE_FAMILIES:
        yield Finding(
            "warning", "model", "", f"a model of type {kind!r}; MindIE 2.3 names LLaMA3.1 8B and 70B, Qwen2-72B, "
            "Qwen2.5 7B to 72B and Qwen3-32B", "", url,
        )  # fmt: skip
    if a.base.get("quantization_config") or a.base.get("quantize"):
        yield Finding("error", "quantised", "", "a quantised base; MindIE serves no LoRA with one", "", url)


def _mindie_fp16(a: _Adapter) -> Iterator[Finding]:
    kind = a.base.get("torch_dtype") or a.base.get("dtype")
    if kind is not None and kind != "float16":
        yield Finding(
            "error", "dtype", "", f"a base in {kind}; MindIE on the 300I Duo takes LoRA with float16 alone",
            "set torch_dtype to float16", SOURCES["mindie-fp16"],
        )  # fmt: skip


_Rule = Callable[[_Adapter], Iterator[Finding]]
RULES: dict[str, tuple[_Rule, ...]] = {
    "vllm-ascend": (_features, _one_scale, _kernel_rank, _kernel_types, _vllm_modules, _heads),
    "mindie-a2": (_mindie,),
    "mindie-300i-duo": (_mindie, _mindie_fp16),
}
