"""What MindSpore calls a layer's tensors, in PyTorch's words: the one table that every reader of names uses."""

from __future__ import annotations

# MindSpore's word -> PyTorch's. PyTorch says "weight" for three of them, so the way back needs the kind of layer.
TO_TORCH = {
    "gamma": "weight",
    "beta": "bias",
    "embedding_table": "weight",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# The part of the way back that is the same for every layer.
STATISTICS_TO_MINDSPORE = {"running_mean": "moving_mean", "running_var": "moving_variance"}


def torch_word(role: str) -> str:
    """The last word of a tensor's name in PyTorch's spelling.

    Example:
        >>> torch_word("gamma"), torch_word("weight")
        ('weight', 'weight')
    """
    return TO_TORCH.get(role, role)


def torch_name(name: str) -> str:
    """A tensor's dotted name with the last word in PyTorch's spelling.

    Example:
        >>> torch_name("encoder.norm.beta")
        'encoder.norm.bias'
    """
    head, dot, last = name.rpartition(".")
    return head + dot + torch_word(last)
