"""nn.MultiheadAttention with room for a prefix: the same arithmetic, spelled out over its own parameters."""

from __future__ import annotations

from typing import Any

from slimkit.core.errors import UnsupportedError
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn, ops

__all__ = ["METHODS", "PrefixedMultiheadAttention", "bridge"]


class PrefixedMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose keys and values pass through `prefix_keys` and `prefix_values`.

    Its methods are put on a subclass that has those two, `prefix_rows` and `prefix_mask` (`prefix_model.Extending`).
    """

    @staticmethod
    def check(cell: nn.MultiheadAttention) -> None:
        """Refuse what this arithmetic leaves out."""
        if cell.bias_k is not None or cell.add_zero_attn:
            raise UnsupportedError("nn.MultiheadAttention with add_bias_kv or add_zero_attn takes no prefix")

    def construct(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
    ) -> tuple[Any, Any]:
        """Attend; arguments and results as in `nn.MultiheadAttention`, the weights with the prefix's columns first."""
        batched = query.ndim == 3
        axis = 0 if self.batch_first else 1
        if not batched:
            query, key, value = query.expand_dims(axis), key.expand_dims(axis), value.expand_dims(axis)
        if not self.batch_first:
            query, key, value = query.swapaxes(0, 1), key.swapaxes(0, 1), value.swapaxes(0, 1)
        q, k, v = self.project(query, 0), self.project(key, 1), self.project(value, 2)
        rows = self.prefix_rows()
        scores = ops.matmul(q / self.head_dim**0.5, self.prefix_keys(k.swapaxes(-2, -1), False, rows))
        if attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.reshape((q.shape[0], self.num_heads) + attn_mask.shape[-2:])
            scores = scores + self.prefix_mask(self.to_add(attn_mask, scores), 0)
        if key_padding_mask is not None:
            padding = key_padding_mask.reshape((q.shape[0], 1, 1, k.shape[2]))
            scores = scores + self.prefix_mask(self.to_add(padding, scores), 0)
        probs = ops.softmax(scores, -1)
        if self.training and self.dropout > 0:
            probs = ops.dropout(probs, p=self.dropout, training=True)
        mixed = ops.matmul(probs, self.prefix_values(v, rows)).swapaxes(1, 2)
        out = self.out_proj(mixed.reshape((q.shape[0], q.shape[2], self.num_heads * self.head_dim)))
        if not self.batch_first:
            out = out.swapaxes(0, 1)
        if average_attn_weights:
            probs = probs.mean(1)
        if not batched:
            out, probs = out.squeeze(axis), probs.squeeze(0)
        if need_weights:
            return out, probs
        return out, None

    def project(self, x: Any, part: int) -> Any:
        """Queries, keys or values (batch, heads, tokens, width) by the part of the weight that makes them."""
        n = self.num_heads * self.head_dim
        if self._qkv_same_embed_dim:
            weight = self.in_proj_weight[part * n : (part + 1) * n]
        else:
            weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[part]
        y = ops.matmul(x, weight.swapaxes(0, 1))
        if self.in_proj_bias is not None:
            y = y + self.in_proj_bias[part * n : (part + 1) * n]
        return y.reshape((x.shape[0], x.shape[1], self.num_heads, self.head_dim)).swapaxes(1, 2)

    def to_add(self, mask: Any, like: Any) -> Any:
        """A mask as what is added to the scores; True hides a position."""
        if mask.dtype != ms.bool_:
            return mask
        return ops.zeros_like(mask, dtype=like.dtype).masked_fill(mask, ops.cast(float("-inf"), like.dtype))


METHODS = {name: vars(PrefixedMultiheadAttention)[name] for name in ("construct", "project", "to_add")}
