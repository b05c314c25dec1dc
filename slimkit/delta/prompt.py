"""Prompt tuning: trained embeddings of virtual tokens."""

from __future__ import annotations

from slimkit import bridge
from slimkit.core.delta.layers import check_sizes

import torch
from torch import nn

__all__ = ["PromptTuning", "bridge"]


class PromptTuning(nn.Module):
    """An embedding of virtual tokens, to be put in front of a text's own.

    Args:
        num_virtual_tokens: length of the prompt.
        token_dim: width of an embedded token; the model's hidden size.
        num_transformer_submodules: 1 for a decoder or encoder, 2 for both together.

    Raises:
        ArgumentTypeError: a size is not a positive int.

    Source:
        Lester, Al-Rfou & Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2.

    Example:
        >>> PromptTuning(3, 8)(torch.arange(3).expand(2, 3)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, num_virtual_tokens: int, token_dim: int, num_transformer_submodules: int = 1) -> None:
        submodules = num_transformer_submodules
        check_sizes(num_virtual_tokens=num_virtual_tokens, token_dim=token_dim, num_transformer_submodules=submodules)
        super().__init__()
        self.num_virtual_tokens, self.token_dim = num_virtual_tokens, token_dim
        self.num_transformer_submodules = submodules
        self.mindpet_delta_prompttuning_embedding = nn.Embedding(num_virtual_tokens * submodules, token_dim)

    def forward(self, prompt_ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) ids to (batch, tokens, token_dim) embeddings."""
        return self.mindpet_delta_prompttuning_embedding(prompt_ids)
