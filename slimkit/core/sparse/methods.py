"""The table of sparsity methods: one row holds everything that the rest of the room asks about a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from slimkit.core import check
from slimkit.core.errors import ConfigError

if TYPE_CHECKING:
    from slimkit.core.sparse.maths.layer import SparseLayer
    from slimkit.core.sparse.maths.solvers import Solution, SparseProblem

# Where the built-in solvers are: named, so that the table can be read before numpy is loaded.
_SOLVERS = "slimkit.core.sparse.maths.solvers"

# What "block" may begin with.
STARTS = ("par", "par_v2")


@dataclass(frozen=True)
class SparseMethod:
    """Everything about a method.

    Args:
        solver: makes one group of a layer sparse: takes a `SparseProblem`, gives the weight (out, n), its mask (out,
            n), True where it stays, and a dict of facts for the layer's row of the report. Written over the array API
            (`array_api_compat`), it serves both frameworks. A function, or "module:function".
        needs_data: whether it reads second moments of the layer's inputs.
        refits: whether it changes the weights that stay, and so may be fitted to the dense model's outputs.
        paired: whether it is so by default (`SparseConfig.asymmetric`).
        cost: seconds per column, per weight, per columns^3 and per weight and column, on one thread of a CPU: for the
            time left and for what is worth sharing among processes.
        options: its own options and their defaults; `SparseConfig.options` sets them, the problem carries them.
        reconstructs: whether each block is then trained to give the dense block's outputs (`reconstruct`); its options
            are the training's.

    Example:
        >>> METHODS["wanda"].needs_data, METHODS["wanda"].refits
        (True, False)
    """

    solver: Callable[[SparseProblem], Solution] | str
    needs_data: bool = True
    refits: bool = False
    paired: bool = False
    cost: tuple[float, float, float, float] = (1e-5, 2e-8, 0.0, 2e-11)
    options: Mapping[str, Any] = field(default_factory=dict)
    reconstructs: bool = False

    def solve(self, problem: SparseProblem) -> Solution:
        """Make one group of a layer sparse."""
        if not isinstance(self.solver, str):
            return self.solver(problem)
        module, _, name = self.solver.partition(":")
        found: Callable[[SparseProblem], Solution] = getattr(import_module(module), name)
        return found(problem)

    def seconds(self, layer: SparseLayer) -> float:
        """Seconds of solving a layer on one thread of a CPU; elsewhere in proportion to those of other layers.

        Example:
            >>> from slimkit.core.sparse.maths.layer import SparseLayer
            >>> one, two = (SparseLayer("fc", "linear", (rows, 1024)) for rows in (1024, 2048))
            >>> METHODS["par"].seconds(one) < METHODS["par"].seconds(two) < 2 * METHODS["par"].seconds(one)
            True
        """
        n, size = layer.n_in, layer.n_out * layer.n_in
        column, weight, cube, product = self.cost
        return layer.groups * (column * n + weight * size + cube * n**3 + product * size * n)


# Costs were measured on one thread of an x86-64 CPU from 128 to 2304 columns, within a quarter.
METHODS: dict[str, SparseMethod] = {
    "magnitude": SparseMethod(f"{_SOLVERS}:magnitude", needs_data=False, cost=(0.0, 2e-8, 0.0, 0.0)),
    "wanda": SparseMethod(f"{_SOLVERS}:wanda", cost=(2.7e-6, 3.5e-8, 0.0, 1.4e-11)),
    "hessian": SparseMethod(f"{_SOLVERS}:hessian", refits=True, cost=(1.8e-5, 6.8e-9, 5.8e-12, 1.9e-11)),
    "par": SparseMethod(f"{_SOLVERS}:par", refits=True, paired=True, cost=(3.2e-5, 2.1e-8, 1.1e-11, 2e-10)),
    "par_v2": SparseMethod(f"{_SOLVERS}:par_v2", refits=True, paired=True, cost=(1.6e-4, 1.1e-7, 1e-10, 1.4e-9)),
    "block": SparseMethod(
        f"{_SOLVERS}:start",
        refits=True,
        paired=True,
        cost=(3.2e-5, 2.1e-8, 1.1e-11, 2e-10),
        options={"start": "par", "passes": 8, "rate": 0.004, "patience": 3, "inherited": 0.3},
        reconstructs=True,
    ),
}


def register_sparse_method(name: str, method: SparseMethod) -> None:
    """Add a method of your own to the table, for this process; every door that takes a method's name then knows it.

    Args:
        name: what `SparseConfig.method` calls it.
        method: its row.

    Raises:
        ArgumentTypeError: `method` is no `SparseMethod`, or its solver cannot be called.
        ConfigError: the name is taken.

    Example:
        >>> def even(p):
        ...     keep = p.weight * 0 == 0
        ...     keep[:, ::2] = False
        ...     return p.weight * keep, keep, {}
        >>> register_sparse_method("even", SparseMethod(even, needs_data=False))
        >>> METHODS.pop("even").needs_data
        False
    """
    check.text(name, "name")
    check.instance(method, SparseMethod, "method")
    if not callable(method.solver):
        check.wrong_type("method.solver", "a function of a SparseProblem", method.solver)
    if name in METHODS:
        raise ConfigError(f"name must be one that no method has yet. Received: {name!r}")
    METHODS[name] = method
