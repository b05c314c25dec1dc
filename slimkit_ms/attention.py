"""nn.MultiheadAttention after heads or features were pruned: the size of a head no longer follows from the width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn, ops

__all__ = ["PrunedMultiheadAttention", "bridge", "settled"]


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with `num_heads` heads of `head_dim` features, whatever the width of its input.

    Surgery turns a cell into this class where MindSpore's own construct would take the size of a head from its input's
    width. Parameters keep their names: `in_proj_weight` (3 * num_heads * head_dim, embed_dim) or the three separate
    ones, and `out_proj`.
    """

    def construct(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
    ) -> Any:
        """Attend; arguments and results as in `nn.MultiheadAttention`."""
        mixed, probs = self.mix(query, key, value, key_padding_mask, attn_mask, average_attn_weights)
        out = self.put_out(mixed)
        if need_weights:
            return out, probs
        return (out,)

    def mix(self, query: Any, key: Any, value: Any, key_padding_mask: Any, attn_mask: Any, average: Any) -> Any:
        """What the output projection is given, (batch, tokens, heads * size) or as `query` lies, and the weights."""
        batched = query.ndim == 3
        axis = 0 if self.batch_first else 1
        if not batched:
            query, key, value = query.expand_dims(axis), key.expand_dims(axis), value.expand_dims(axis)
        if not self.batch_first:
            query, key, value = query.swapaxes(0, 1), key.swapaxes(0, 1), value.swapaxes(0, 1)
        # (batch, tokens, heads * size)
        q, k, v = self.project(query, 0), self.project(key, 1), self.project(value, 2)
        size, n_batch, n_query = self.head_dim, q.shape[0], q.shape[1]
        if self.bias_k is not None:
            k = ops.cat((k, self.bias_k.tile((n_batch, 1, 1)).astype(k.dtype)), 1)
            v = ops.cat((v, self.bias_v.tile((n_batch, 1, 1)).astype(v.dtype)), 1)
        if self.add_zero_attn:
            nothing = ops.zeros((n_batch, 1, self.num_heads * size), k.dtype)
            k, v = ops.cat((k, nothing), 1), ops.cat((v, nothing), 1)
        # (batch, heads, tokens, size)
        q = q.reshape((n_batch, n_query, self.num_heads, size)).swapaxes(1, 2)
        k = k.reshape((n_batch, k.shape[1], self.num_heads, size)).swapaxes(1, 2)
        v = v.reshape((n_batch, v.shape[1], self.num_heads, size)).swapaxes(1, 2)
        scores = ops.matmul(q / size**0.25, k.swapaxes(-2, -1) / size**0.25)
        if attn_mask is not None:
            scores = scores + self.to_add(self.per_head(attn_mask, n_batch), scores)
        if key_padding_mask is not None:
            padding = key_padding_mask.reshape((n_batch, 1, 1, key_padding_mask.shape[-1]))
            scores = scores + self.to_add(padding, scores)
        probs = ops.softmax(scores, -1)
        if self.training and self.dropout > 0:
            probs = ops.dropout(probs, p=self.dropout, training=True)
        mixed = ops.matmul(probs, v).swapaxes(1, 2).reshape((n_batch, n_query, self.num_heads * size))
        if not self.batch_first:
            mixed = mixed.swapaxes(0, 1)
        if average:
            probs = probs.mean(1)
        if not batched:
            mixed, probs = mixed.squeeze(axis), probs.squeeze(0)
        return mixed, probs

    def put_out(self, mixed: Any) -> Any:
        """The output projection."""
        return self.out_proj(mixed)

    def project(self, x: Any, part: int) -> Any:
        """Queries, keys or values (batch, tokens, heads * size) by the part of the weight that makes them."""
        n = self.num_heads * self.head_dim
        if self.in_proj_weight is not None:
            weight = self.in_proj_weight[part * n : (part + 1) * n]
        else:
            weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[part]
        y = ops.matmul(x, weight.swapaxes(0, 1))
        if self.in_proj_bias is not None:
            y = y + self.in_proj_bias[part * n : (part + 1) * n]
        return y

    def per_head(self, mask: Any, n_batch: int) -> Any:
        """A mask (queries, keys), or one for each sample and head, as (batch or 1, heads or 1, queries, keys)."""
        if mask.ndim == 2:
            return mask.expand_dims(0).expand_dims(0)
        mask = mask.reshape((n_batch, mask.shape[0] // n_batch, mask.shape[1], mask.shape[2]))
        # The mask may have been made for the heads before the cut.
        return mask[:, : self.num_heads]

    def to_add(self, mask: Any, scores: Any) -> Any:
        """A mask as what is added to the scores: True hides a position; columns behind its end are seen."""
        if mask.dtype == ms.bool_ or mask.dtype == ms.uint8:
            mask = ops.zeros_like(mask, dtype=scores.dtype).masked_fill(
                mask.astype(ms.bool_), ops.cast(float("-inf"), scores.dtype)
            )
        missing = scores.shape[-1] - mask.shape[-1]
        if missing > 0:
            mask = ops.cat((mask, ops.zeros(mask.shape[:-1] + (missing,), mask.dtype)), -1)
        return mask


def settled(cell: nn.MultiheadAttention) -> Mapping[str, Any]:
    """What the attributes of an attention must say, as the shapes of its weights tell; `__class__` where it changes."""
    embed, inner = (int(n) for n in cell.out_proj.weight.shape)
    out: dict[str, Any] = {"embed_dim": embed, "num_heads": inner // cell.head_dim, "kdim": embed, "vdim": embed}
    if cell.in_proj_weight is None:
        out["kdim"], out["vdim"] = int(cell.k_proj_weight.shape[1]), int(cell.v_proj_weight.shape[1])
    if inner != embed and type(cell) is nn.MultiheadAttention:
        # MindSpore's own construct takes the size of a head from the width of its input.
        out["__class__"] = PrunedMultiheadAttention
    return out
