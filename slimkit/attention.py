"""nn.MultiheadAttention after heads or features were pruned: the size of a head no longer follows from the width."""

from __future__ import annotations

from slimkit import bridge  # noqa: F401  (a missing framework gives one line)

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with `num_heads` heads of `head_dim` features, whatever the width of its input.

    Surgery turns a module into this class where torch's own forward would take the size of a head from its input's
    width.
    Parameters keep their names: `in_proj_weight` (3 * num_heads * head_dim, embed_dim) or the three separate ones,
    and `out_proj`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results as in `nn.MultiheadAttention`."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases))
        n_batch, n_query = q.shape[:2]
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(n_batch, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(n_batch, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (t.view(n_batch, -1, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        k, v, mask = self.extend(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            score = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            probs = F.dropout((score if mask is None else score + mask).softmax(-1), dropout)
            mixed = probs @ v
        else:
            probs = None
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).reshape(n_batch, n_query, self.num_heads * self.head_dim))
        if probs is not None and average_attn_weights:
            probs = probs.mean(1)
        if not self.batch_first:
            out = out.transpose(0, 1)
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            probs = None if probs is None else probs.squeeze(0)
        return out, probs

    def extend(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (batch, heads, tokens, head_dim) and the mask; a subclass may put more in front."""
        return k, v, mask

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one to be added to the scores, (batch or 1, heads or 1, queries, keys)."""
        total = None
        n_batch, n_keys = q.shape[0], k.shape[2]
        for mask in (attn_mask, padding):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
            if (
                mask is not attn_mask
                and padding is not None
                and mask.dim() == 2
                and total is None
                and attn_mask is None
            ):
                mask = mask.view(n_batch, 1, 1, -1)
            elif mask.dim() == 3:
                # torch gives one mask a batch element and head; a pruned module may have fewer heads than the mask
                # was made for.
                mask = mask.view(n_batch, -1, *mask.shape[1:])
                mask = mask[:, : q.shape[1]]
            elif total is not None or padding is None or attn_mask is None:
                mask = mask.view(n_batch, 1, 1, -1) if total is not None else mask[None, None]
            else:
                mask = mask[None, None]
            mask = F.pad(mask, (0, n_keys - mask.shape[-1])) if mask.shape[-1] < n_keys else mask
            total = mask if total is None else total + mask
        return total
