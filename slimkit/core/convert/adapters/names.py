"""What a layer of a decoder is called in each layout, and which of its matrices are one matrix there.

Names and the order of rows were read in these places (docs/convert.md lists them): MindFormers'
mindformers/models/llama/convert_weight.py at 8af1897f, MindSpeed-LLM's
mindspeed_llm/tasks/checkpoint/convert_mg2hf.py at 79e29b77.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# place -> the roles whose matrices it holds, in the order of their rows
PLACES: dict[str, tuple[str, ...]] = {
    "qkv": ("query", "key", "value"),
    "out": ("out",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
# Places whose inputs are cut among tensor-parallel processes; of the others the outputs are.
BY_INPUT = ("out", "down")

_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
_FFN = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_MIXTRAL = {"w1": "gate", "w3": "up", "w2": "down"}
_PLACE_OF = {role: place for place, roles in PLACES.items() for role in roles}
_MINDFORMERS = {
    "query": "attention.wq", "key": "attention.wk", "value": "attention.wv", "out": "attention.wo",
    "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
}  # fmt: skip
_MINDFORMERS_FUSED = {"qkv": "attention.w_qkv", "gate_up": "feed_forward.w_gate_hidden"}
_MEGATRON = {
    "qkv": "self_attention.linear_qkv",
    "out": "self_attention.linear_proj",
    "gate_up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2",
}
_HF = re.compile(
    r"model\.layers\.(\d+)\.(self_attn|mlp|(?:block_sparse_moe|mlp)\.experts\.(\d+))\.([a-z0-9_]+)", re.ASCII
)


class Slot(NamedTuple):
    """One matrix of a decoder.

    Args:
        layer: which block.
        role: query, key, value, out, gate, up or down.
        expert: which one, in a mixture of experts.
        mixtral: whether Hugging Face calls its parts w1, w2 and w3.
    """

    layer: int
    role: str
    expert: int | None = None
    mixtral: bool = False

    @property
    def place(self) -> str:
        """The key of PLACES that holds it."""
        return _PLACE_OF[self.role]


class Whole(NamedTuple):
    """A matrix of a layout that may hold several of ours: its name, and the slots in the order of their rows."""

    name: str
    place: str
    slots: tuple[Slot, ...]


def slot_of(path: str) -> Slot | None:
    """The matrix that a Hugging Face path names: Llama's, Qwen's, Mixtral's and what is named like them.

    Example:
        >>> slot_of("model.layers.3.self_attn.v_proj")
        Slot(layer=3, role='value', expert=None, mixtral=False)
        >>> slot_of("model.layers.0.block_sparse_moe.experts.1.w3").role
        'up'
    """
    found = _HF.fullmatch(path)
    if found is None:
        return None
    layer, module, expert, last = found.groups()
    mixtral = module.startswith("block_sparse_moe")
    role = (_ATTENTION if module == "self_attn" else _MIXTRAL if mixtral else _FFN).get(last)
    return None if role is None else Slot(int(layer), role, None if expert is None else int(expert), mixtral)


def path_of(slot: Slot) -> str:
    """The Hugging Face path of a matrix.

    Example:
        >>> path_of(Slot(3, "down"))
        'model.layers.3.mlp.down_proj'
    """
    module, words = ("self_attn", _ATTENTION) if slot.place in ("qkv", "out") else ("mlp", _FFN)
    if slot.expert is not None:
        module = f"{'block_sparse_moe' if slot.mixtral else 'mlp'}.experts.{slot.expert}"
        words = _MIXTRAL if slot.mixtral else _FFN
    last = next(word for word, role in words.items() if role == slot.role)
    return f"model.layers.{slot.layer}.{module}.{last}"


def wholes(slots: list[Slot], layout: str, *, fused: bool = True) -> list[Whole]:
    """The matrices of a layout that hold these slots, each with all the slots that it has room for.

    Args:
        slots: those of an adapter.
        layout: "mindformers" or "megatron".
        fused: whether query, key and value, and gate and up, are one matrix; Megatron's always are.

    Example:
        >>> [w.name for w in wholes([Slot(0, "query"), Slot(0, "down")], "megatron")]
        ['decoder.layers.0.self_attention.linear_qkv', 'decoder.layers.0.mlp.linear_fc2']
    """
    found: dict[str, Whole] = {}
    for slot in slots:
        together = layout == "megatron" or (fused and slot.place in _MINDFORMERS_FUSED)
        roles = PLACES[slot.place] if together else (slot.role,)
        name = _megatron(slot) if layout == "megatron" else _mindformers(slot, together=together)
        found[name] = Whole(name, slot.place, tuple(slot._replace(role=role) for role in roles))
    return list(found.values())


def _mindformers(slot: Slot, *, together: bool) -> str:
    return f"model.layers.{slot.layer}.{_MINDFORMERS_FUSED[slot.place] if together else _MINDFORMERS[slot.role]}"


def _megatron(slot: Slot) -> str:
    name = _MEGATRON[slot.place]
    if slot.expert is not None:
        name = name.replace("mlp.", f"mlp.experts.local_experts.{slot.expert}.")
    return f"decoder.layers.{slot.layer}.{name}"


def whole_of(name: str, layout: str, *, mixtral: bool = False) -> Whole | None:
    """What a matrix of a layout holds; None for a name that is none of the layout's.

    Example:
        >>> [s.role for s in whole_of("decoder.layers.2.mlp.linear_fc1", "megatron").slots]
        ['gate', 'up']
    """
    if layout == "megatron":
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name, re.ASCII)
        if found is None:
            return None
        expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", found[2], re.ASCII)
        last = found[2] if expert is None else f"mlp.{expert[2]}"
        place = next((p for p, word in _MEGATRON.items() if word == last), None)
        if place is None or (expert is not None and place in ("qkv", "out")):
            return None
        number = None if expert is None else int(expert[1])
        slots = tuple(Slot(int(found[1]), role, number, mixtral and number is not None) for role in PLACES[place])
        return Whole(name, place, slots)
    found = re.fullmatch(r"model\.layers\.(\d+)\.([a-z0-9_]+\.[a-z0-9_]+)", name, re.ASCII)
    if found is None:
        return None
    place = next((p for p, word in _MINDFORMERS_FUSED.items() if word == found[2]), None)
    role = next((r for r, word in _MINDFORMERS.items() if word == found[2]), None)
    if place is None and role is None:
        return None
    roles = PLACES[place] if place else (str(role),)
    return Whole(name, place or _PLACE_OF[str(role)], tuple(Slot(int(found[1]), r) for r in roles))
