"""What solving a layer costs: for the time that is left, and for what is worth sharing among processes."""

from __future__ import annotations

from slimkit.core.sparse.maths.layer import SparseLayer

# Seconds that a method takes for a layer: per column, per weight, per columns^3 and per weight and column. Measured on
# one thread of an x86-64 CPU from 128 to 2304 columns, within a quarter.
COSTS = {
    "magnitude": (0.0, 2e-8, 0.0, 0.0),
    "wanda": (2.7e-6, 3.5e-8, 0.0, 1.4e-11),
    "hessian": (1.8e-5, 6.8e-9, 5.8e-12, 1.9e-11),
    "par": (3.2e-5, 2.1e-8, 1.1e-11, 2e-10),
    "par_v2": (1.6e-4, 1.1e-7, 1e-10, 1.4e-9),
}


def seconds_to_solve(layer: SparseLayer, method: str) -> float:
    """Seconds of solving a layer on one thread of a CPU; elsewhere in proportion to those of other layers.

    Example:
        >>> one, two = (SparseLayer("fc", "linear", (rows, 1024)) for rows in (1024, 2048))
        >>> seconds_to_solve(one, "par") < seconds_to_solve(two, "par") < 2 * seconds_to_solve(one, "par")
        True
    """
    n, size = layer.n_in, layer.n_out * layer.n_in
    column, weight, cube, product = COSTS[method]
    return layer.groups * (column * n + weight * size + cube * n**3 + product * size * n)
