"""What vLLM-Ascend and MindIE say that they take of a W16A16S or W8A8S folder: each rule with its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from slimkit.core import check, files
from slimkit.core.ascend import w8a8s
from slimkit.core.ascend.findings import Check, Finding, in_order
from slimkit.core.ascend.folder import DESCRIPTION, kind_of
from slimkit.core.ascend.w8a8s import W8A8S, load_w8a8s
from slimkit.core.ascend.w16a16s import W16A16S, load_w16a16s

FORMAT = "slimkit-served-check"
VERSION = 1
TARGETS = ("vllm-ascend", "mindie-300i-duo", "mindie-a2")

# Read on 1 December 2026.
_ASCEND = "https://github.com/vllm-project/vllm-ascend/blob"
_MINDIE = "https://github.com/Ascend/MindIE-LLM/blob/1c18b4b7b907b07025a79f9868c32a0f98c2a8a4/examples/atb_models"
SOURCES = {
    "scheme": f"{_ASCEND}/2be21f6641e84455213b62130fc7927aa251d08b/vllm_ascend/_310p/quantization/methods/w8a8s.py",
    "packing": f"{_ASCEND}/f000a23a3d3a381c437817fec62c8e3116ecc70b/examples/save_sharded_state_310.py",
    "words": f"{_ASCEND}/09d824e520775ea6369b4d152d2dfdf95cbda776/vllm_ascend/_310p/quantization/modelslim_config.py",
    "mindie": f"{_MINDIE}/examples/models/qwen/README.md",
    "w16a16s": "https://www.hiascend.com/document/detail/zh/mindie/230/mindiellm/llmdev/mindie_llm0529.html",
}
_OUTPUT = "lm_head.weight"


@dataclass(frozen=True, repr=False)
class ServedCheck(Check):
    """What `check_served` found.

    Args:
        folder: the folder.
        kind: "W16A16S" or "W8A8S".
        target: who is to serve it.
        findings: errors first.
    """

    rules = ("kind", "quantize", "dtype", "joined", "word", "model")

    folder: str
    kind: str
    target: str
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with a format and a version."""
        plain = {**vars(self), "findings": [asdict(f) for f in self.findings]}
        return {"format": FORMAT, "version": VERSION, **plain, "exit_code": self.exit_code, "counts": self.counts()}


def check_served(directory: files.PathLike, target: str = "vllm-ascend") -> ServedCheck:
    """Compare a W16A16S or W8A8S folder with what a server on Ascend says that it takes; no device is needed.

    Args:
        directory: what `save_w16a16s` or `save_w8a8s` wrote, or another tool of the same formats.
        target: "vllm-ascend" (on the 310P), "mindie-300i-duo" or "mindie-a2".

    Returns:
        The findings, each with the document or source that it rests on.

    Raises:
        ArgumentError: an unknown target.
        FileFormatError: the folder is damaged, or is no such folder: every tensor's word, type and shape is looked at.

    Example:
        >>> check_served("w8a8s", "mindie-300i-duo").findings  # doctest: +SKIP
        (Finding(severity='warning', rule='model', node='', message="a model of type 'llama' ...", ...),)
    """
    check.choice(target, TARGETS, "target")
    folder = files.as_path(directory, "directory")
    kind = kind_of(folder)
    read = load_w8a8s(folder) if kind == w8a8s.KIND else load_w16a16s(folder)
    words = files.read_json(folder / DESCRIPTION, DESCRIPTION)
    found = [*_taken(kind, target), *_config(kind, target, read.config)]
    if isinstance(read, W8A8S):
        found += _joined(read)
    if target == "vllm-ascend":
        found += _words(read, words)
    return ServedCheck(str(folder), kind, target, in_order(tuple(found)))


def _taken(kind: str, target: str) -> Iterator[Finding]:
    if target == "mindie-a2":
        yield Finding(
            "error", "kind", "", f"{kind} is for the Atlas 300I Duo alone", 'for A2 and A3: pattern="4:2" and ATC',
            SOURCES["mindie"],
        )  # fmt: skip
    elif target == "mindie-300i-duo":
        yield Finding(
            "info", "kind", "", f"MindIE packs it to {kind}C on the device before it serves it, for so many devices as "
            "shall serve it (examples.convert.model_slim.sparse_compressor)", "", SOURCES["mindie"],
        )  # fmt: skip
    elif kind == w8a8s.KIND:
        yield Finding("info", "kind", "", "vLLM-Ascend serves it on the 310P alone", "", SOURCES["scheme"])
    else:
        yield Finding(
            "error", "kind", "", f"vLLM-Ascend has no scheme for {kind}, and its packing stops with an error",
            "W8A8S: SparseConfig(weight_bits=8) and save_w8a8s", SOURCES["packing"],
        )  # fmt: skip


def _config(kind: str, target: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    dtype = config.get("torch_dtype", config.get("dtype"))
    if dtype not in (None, "float16"):
        yield Finding(
            "error", "dtype", "", f"config.json says {dtype}; the 310P computes float16 alone",
            'set "torch_dtype" to "float16"', SOURCES["mindie"],
        )  # fmt: skip
    if target == "vllm-ascend":
        return
    if config.get("quantize") != kind.lower():
        yield Finding(
            "error", "quantize", "", f"config.json must say \"quantize\": \"{kind.lower()}\", or MindIE reads no "
            f"description. It says {config.get('quantize')!r}", "write it there, or save the folder again",
            SOURCES["mindie"],
        )  # fmt: skip
    model, blocks = config.get("model_type"), config.get("num_hidden_layers")
    if kind == w8a8s.KIND and model not in (None, "qwen2", "qwen3"):
        yield Finding(
            "warning", "model", "", f"a model of type {model!r}; MindIE names Qwen2, Qwen2.5 and Qwen3", "",
            SOURCES["mindie"],
        )  # fmt: skip
    elif kind != w8a8s.KIND and (model, blocks) != ("qwen3", 64):
        yield Finding(
            "warning", "model", "", f"a model of type {model!r} with {blocks} blocks; MindIE names Qwen3-32B alone", "",
            SOURCES["w16a16s"],
        )  # fmt: skip


def _joined(read: W8A8S) -> Iterator[Finding]:
    layers = {name.removesuffix(".weight") for name in read.kinds if name.endswith(".weight")}
    int8 = read.layers
    for beside in w8a8s.joined({name: name for name in sorted(layers)}):
        steps = {(float(int8[n].input_scale[0]), int(int8[n].input_offset[0])) if n in int8 else None for n in beside}
        if len(steps) > 1:
            what = "some int8 and some floats" if None in steps else "input steps of their own"
            yield Finding(
                "error", "joined", beside[0], f"{', '.join(beside)} are served as one layer, and have {what}",
                "save_w8a8s gives them one step", SOURCES["words"],
            )  # fmt: skip


def _words(read: W8A8S | W16A16S, words: Mapping[str, Any]) -> Iterator[Finding]:
    if read.config.get("tie_word_embeddings") is True and _OUTPUT not in words:
        yield Finding(
            "warning", "word", _OUTPUT, f"the description has no word for {_OUTPUT}, which is tied to the table; "
            "vLLM-Ascend asks for that of every layer that it builds, as Llama does", "save the folder again",
            SOURCES["words"],
        )  # fmt: skip
