"""What each expert of a layer says: the module that holds them all is asked for one after another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit import kinds

import torch
from torch import nn

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ExpertCall:
    """One call of a module that holds experts.

    Args:
        hidden: (tokens, n_in) what it was given.
        chosen: (tokens, k) which experts each token is for.
        shares: (tokens, k) with which shares.
        number: of experts.
        says: (hidden, chosen, shares) -> what it says.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    shares: torch.Tensor
    number: int
    says: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def said_by(self, expert: int, chosen: torch.Tensor) -> torch.Tensor | None:
        """Share times what an expert says to the tokens that chose it, (n, n_out); None where none did."""
        token, place = torch.where(chosen == expert)
        if not len(token):
            return None
        only = torch.full((len(token), 1), expert, dtype=chosen.dtype, device=chosen.device)
        share = self.shares[token, place][:, None]
        return self.says(self.hidden[token], only, torch.ones_like(share)).float() * share.float()


def holds_experts(module: nn.Module) -> bool:
    """Whether a module may hold experts: it is no known layer, and one of its own parameters is a matrix an expert."""
    return kinds.kind_of(module) is None and any(p.dim() == 3 for p in module.parameters(recurse=False))


def expert_call(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> ExpertCall | None:
    """Read a call: hidden states, whole numbers below the number of experts, and as many shares.

    Args:
        module: that was called.
        args: by place.
        kwargs: by name.
        output: what it said.

    Returns:
        The call; None where it was made in another way.
    """
    if not isinstance(output, torch.Tensor) or output.dim() != 2:
        return None
    number = next(len(p) for p in module.parameters(recurse=False) if p.dim() == 3)
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.dim() == 2}
    if len(tensors) != 3:
        return None
    whole = [n for n, v in tensors.items() if not v.is_floating_point()]
    if len(whole) != 1:
        return None
    chosen = tensors[whole[0]]
    others = [n for n in tensors if n != whole[0]]
    # The first is what flows, as everywhere; the other one has the choice's shape.
    hidden, shares = tensors[others[0]], tensors[others[1]]
    if shares.shape != chosen.shape or len(hidden) != len(chosen) or output.shape[0] != len(hidden):
        return None
    names = others[0], whole[0], others[1]

    def says(*three: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = module.forward(**{**given, **dict(zip(names, three))})
        return answer

    return ExpertCall(hidden.detach(), chosen, shares.detach(), number, says)


@torch.no_grad()
def routed_sums(call: ExpertCall, real: Array | None) -> tuple[Array, int]:
    """Sums over the tokens of each expert.

    Args:
        call: of the module.
        real: (tokens,) which tokens are no padding; None for all.

    Returns:
        (experts, n_out) squares of its share times what it says, and tokens in all.
    """
    chosen = call.chosen
    if real is not None:
        chosen = chosen.masked_fill(~torch.from_numpy(real).to(chosen.device)[:, None], -1)
    squares = np.zeros((call.number, call.hidden.shape[1]))
    for expert in range(call.number):
        said = call.said_by(expert, chosen)
        if said is not None:
            squares[expert] = said.square().double().sum(0).cpu().numpy()
    return squares, len(chosen) if real is None else int(real.sum())
