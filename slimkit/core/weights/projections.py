"""What models call the projections of their attention layers: the one table of names of Hugging Face families."""

from __future__ import annotations

# What a projection is called in the models people use; compared in lower case.
_QUERY = {"query", "q", "q_proj", "to_q", "wq", "q_lin", "query_proj", "linear_q", "q_linear", "w_q", "query_dense"}
_KEY = {"key", "k", "k_proj", "to_k", "wk", "k_lin", "key_proj", "linear_k", "k_linear", "w_k", "key_dense"}
_VALUE = {"value", "v", "v_proj", "to_v", "wv", "v_lin", "value_proj", "linear_v", "v_linear", "w_v", "value_dense"}
_FUSED = {
    "qkv",
    "c_attn",
    "qkv_proj",
    "wqkv",
    "in_proj",
    "to_qkv",
    "w_pack",
    "qkv_linear",
    "in_proj_weight",
    "in_proj_bias",
}
_GROUPED = {"query_key_value"}  # rows lie group by group: the group's queries, then its key, then its value


def words_of(name: str) -> list[str]:
    """The words of a parameter's module path, without the numbers at its end ("a.to_out.0.weight" -> a, to_out)."""
    words = name.split(".")
    if words[-1] not in ("in_proj_weight", "in_proj_bias"):
        words = words[:-1]
    while len(words) > 1 and words[-1].isdigit():
        words = words[:-1]
    return words or [""]


def attention_role(word: str) -> str | None:
    """What a projection is to its attention layer by its name: query, key, value, fused, grouped, or None.

    Example:
        >>> attention_role("q_proj"), attention_role("c_attn"), attention_role("dense")
        ('query', 'fused', None)
    """
    word = word.lower()
    for role, names in (("query", _QUERY), ("key", _KEY), ("value", _VALUE), ("fused", _FUSED), ("grouped", _GROUPED)):
        if word in names:
            return role
    return None


def attention_path(words: list[str]) -> str:
    """The path of a projection's attention layer: up to the first attention-like word after the block number."""
    block = max((i for i, w in enumerate(words) if w.isdigit()), default=-1)
    for i in range(block + 1, len(words) - 1):
        if "att" in words[i].lower() or words[i].lower() in ("mha", "mhsa"):
            return ".".join(words[: i + 1])
    return ".".join(words[:-1])
