"""Prefixes: trained keys and values that stand in front of an attention layer's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.delta.layers import check_prefix, check_sizes, rate, size
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn, ops

__all__ = ["PrefixEncoder", "PrefixLayer", "bridge"]


class PrefixLayer(nn.Cell):
    """Trained prefix keys and values of one attention layer, from embeddings through a small network.

    Key and value come from separate halves of the network's output, and are computed anew on every call, so that
    gradients reach every parameter.

    Args:
        prefix_token_num: rows of the prefix.
        batch_size: samples per step; prefix_token_num is a multiple of it.
        num_heads: attention heads.
        hidden_dim: width of a key and of a value.
        embed_dim: width of the prefix embedding.
        mid_dim: width of the network's middle.
        dropout_rate: share of the result dropped in training, in [0, 1).

    Raises:
        ArgumentTypeError: a size is not a positive int.
        ArgumentError: prefix_token_num is no multiple of batch_size, or dropout_rate outside [0, 1).

    Source:
        Li & Liang 2021, "Prefix-Tuning", section 4.3 (reparametrisation).

    Example:
        >>> layer = PrefixLayer(prefix_token_num=4, batch_size=2, num_heads=2, hidden_dim=8, embed_dim=6)
        >>> key, value = layer()
        >>> key.shape
        (4, 8)
    """

    def __init__(
        self,
        prefix_token_num: int,
        batch_size: int,
        num_heads: int,
        hidden_dim: int,
        embed_dim: int,
        mid_dim: int = 512,
        dropout_rate: float = 0.1,
    ) -> None:
        check_prefix(prefix_token_num, batch_size)
        check_sizes(num_heads=num_heads, hidden_dim=hidden_dim, embed_dim=embed_dim, mid_dim=mid_dim)
        rate(dropout_rate, "dropout_rate")
        super().__init__()
        self.prefix_token_num, self.batch_size, self.num_heads = prefix_token_num, batch_size, num_heads
        self.hidden_dim, self.embed_dim, self.mid_dim = hidden_dim, embed_dim, mid_dim
        self.dropout_rate = dropout_rate
        self.dropout = nn.Dropout(p=float(dropout_rate))
        self.input_tokens = ms.Tensor(np.arange(prefix_token_num), ms.int32)
        self.mindpet_delta_prefixtuning_wte = nn.Embedding(prefix_token_num, embed_dim)
        self.mindpet_delta_prefixtuning_control_trans = nn.SequentialCell(
            nn.Dense(embed_dim, mid_dim), nn.Tanh(), nn.Dense(mid_dim, 2 * hidden_dim)
        )

    def construct(self) -> tuple[Any, Any]:
        """Keys and values, each (prefix_token_num, hidden_dim)."""
        both = self.mindpet_delta_prefixtuning_control_trans(self.mindpet_delta_prefixtuning_wte(self.input_tokens))
        both = self.dropout(both)
        return both[:, : self.hidden_dim], both[:, self.hidden_dim :]

    @property
    def past_key_reparam(self) -> Any:
        """The keys (prefix_token_num, hidden_dim), computed now; read it in construct, not in a constructor."""
        return self()[0]

    @property
    def past_value_reparam(self) -> Any:
        """The values (prefix_token_num, hidden_dim), computed now; read it in construct, not in a constructor."""
        return self()[1]


class PrefixEncoder(nn.Cell):
    """Prefix keys and values of all attention layers of a model (P-tuning v2).

    Args:
        pre_seq_len: prefix tokens.
        num_layers: attention layers.
        num_heads: heads of keys and values (fewer than of queries in grouped-query attention).
        kv_channels: width of one head.
        prefix_projection: whether a small network stands between embedding and result.
        projection_dim: width of its middle; needed with prefix_projection.
        dropout_prob: share of the result dropped in training, in [0, 1).
        parallel_config: an object with data_parallel and model_parallel, handed to `shard`; None for neither.
        out_perm: order of the axes (batch, token, layer and half, head, channel) in the result.

    Raises:
        ArgumentTypeError: a size is not a positive int, or the flag no bool.
        ArgumentError: dropout_prob outside [0, 1).

    Source:
        Liu et al. 2022, "P-Tuning v2", section 3.2.

    Example:
        >>> encoder = PrefixEncoder(3, num_layers=2, num_heads=2, kv_channels=4)
        >>> [pair.shape for pair in encoder(5)]
        [(2, 5, 2, 3, 4), (2, 5, 2, 3, 4)]
    """

    def __init__(
        self,
        pre_seq_len: int,
        num_layers: int,
        num_heads: int,
        kv_channels: int,
        prefix_projection: bool = False,
        projection_dim: int | None = None,
        dropout_prob: float = 0.0,
        parallel_config: Any = None,
        out_perm: tuple[int, ...] = (2, 0, 3, 1, 4),
    ) -> None:
        check_sizes(pre_seq_len=pre_seq_len, num_layers=num_layers, num_heads=num_heads, kv_channels=kv_channels)
        check.boolean(prefix_projection, "prefix_projection")
        middle = size(projection_dim, "projection_dim") if prefix_projection else 0
        rate(dropout_prob, "dropout_prob")
        super().__init__()
        self.pre_seq_len, self.num_layers = pre_seq_len, num_layers
        self.num_heads, self.kv_channels = num_heads, kv_channels
        self.prefix_projection, self.out_perm = prefix_projection, tuple(out_perm)
        width = num_layers * num_heads * kv_channels * 2
        self.dropout = nn.Dropout(p=float(dropout_prob))
        self.mindpet_delta_ptuning2_embedding = nn.Embedding(pre_seq_len, width)
        if prefix_projection:
            self.mindpet_delta_ptuning2_dense_in = nn.Dense(width, middle)
            self.mindpet_delta_ptuning2_dense_out = nn.Dense(middle, width)
        self.cast, self.transpose = ops.Cast(), ops.Transpose()
        if parallel_config is not None:
            self.shard(parallel_config.data_parallel, parallel_config.model_parallel)

    def construct(self, batch_size: int, dtype: Any = None) -> tuple[Any, ...]:
        """One (2, batch, heads, tokens, channels) tensor of keys and values per layer.

        Args:
            batch_size: samples to repeat the prefix for.
            dtype: of the result; None means the parameters' own.
        """
        prefix = self.mindpet_delta_ptuning2_embedding.embedding_table.value()
        if self.prefix_projection:
            prefix = self.mindpet_delta_ptuning2_dense_out(ops.tanh(self.mindpet_delta_ptuning2_dense_in(prefix)))
        if dtype is not None:
            prefix = self.cast(prefix, dtype)
        parts = prefix.reshape((1, self.pre_seq_len, 2 * self.num_layers, self.num_heads, self.kv_channels))
        parts = self.dropout(ops.tile(parts, (batch_size, 1, 1, 1, 1)))
        parts = self.transpose(parts, self.out_perm)
        return tuple(parts[2 * i : 2 * i + 2] for i in range(self.num_layers))

    def shard(self, data_parallel: int, model_parallel: int) -> PrefixEncoder:
        """Record how the encoder's operators are distributed; it takes effect in (semi-)automatic parallel mode.

        Args:
            data_parallel: cuts of the batch.
            model_parallel: cuts of the projection's outputs.

        Returns:
            The encoder.

        Raises:
            ArgumentTypeError: a cut is not a positive int.
        """
        batch, model = size(data_parallel, "data_parallel"), size(model_parallel, "model_parallel")
        if self.prefix_projection:
            for dense in (self.mindpet_delta_ptuning2_dense_in, self.mindpet_delta_ptuning2_dense_out):
                dense.matmul.shard(((1, 1), (model, 1)))
                dense.bias_add.shard(((1, model), (model,)))
        self.transpose.shard(((batch, 1, 1, 1, 1),))
        self.dropout.dropout.shard(((batch, 1, 1, 1, 1),))
        return self
