"""Parameters that no pass of the trace reached: what their twins, shapes and scopes tell of their axes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from slimkit.core.log import logger
from slimkit.core.prune.dims import FREE, ONE, Dim, find, fix, fixed, leaves, unify
from slimkit.core.prune.relations import Relations

_NUMBERS = re.compile(r"\d+")
# Weights of attention and recurrence: which of their equal axes mean the same cannot be told from shapes.
_TANGLED = re.compile(r"att|query|key|value|qkv|in_proj|_proj_weight|weight_(ih|hh|hr)|(^|[._])[qkvo](_proj)?\.")


def couple_unread(r: Relations) -> None:
    """Couple what did not run: as its twin is, else with the one width of its size around it, else keep those whole.

    Args:
        r: the relations of a graph, its operators related already.
    """
    unread = [p for p in r.graph.shapes if p not in r.params]
    if unread:
        _mirror(r, unread)
        _by_shape(r, [p for p in unread if p not in r.params])


def _mirror(r: Relations, unread: list[str]) -> None:
    """Parameters that did not run follow the first one that did among those alike but for numbers in their names.

    An expert that the example did not reach must still fit the widths of those it did.
    """
    read: dict[tuple[str, tuple[int, ...]], str] = {}
    for path in r.params:
        read.setdefault((_NUMBERS.sub("#", path), r.graph.shapes[path]), path)
    for path in unread:
        twin = read.get((_NUMBERS.sub("#", path), r.graph.shapes[path]))
        if twin is not None and twin != path:
            r.params[path] = r.params[twin]
            for axis in range(len(r.graph.shapes[path])):
                if (twin, axis) in r.roles:
                    r.roles[path, axis] = r.roles[twin, axis]
            r.graph.notes.append(f"{path} did not run; it is cut as {twin} is")


def _by_shape(r: Relations, unread: list[str]) -> None:
    made = {x for dim in r.made for x in map(find, leaves(dim))}
    around: dict[str, dict[int, list[Dim]]] = {}
    scopes = {node.scope for node in r.graph.nodes} | set(r.graph.crossings)
    tied: list[str] = []
    whole: dict[int, list[str]] = {}
    for path in unread:
        scope = next((s for s in _outwards(path) if s in scopes), None)
        if scope is None:
            continue
        if scope not in around:
            around[scope] = _widths(r, scope)
        sibling = _sibling(r, path)
        if sibling is not None:
            r.params[path] = sibling
            tied.append(path)
            continue
        dims = [Dim(n) if n != 1 else ONE for n in r.graph.shapes[path]]
        found = False
        for dim in dims:
            near = [d for d in around[scope].get(dim.size, ()) if find(d) is not ONE]
            open_ = [d for d in near if any(x.kind == FREE and x in made for x in map(find, leaves(d)))]
            if not open_:
                fix(dim, "not used when the model ran")
            elif len(near) == 1 and not _TANGLED.search(path):
                unify(dim, open_[0])
                found = True
            else:
                for other in open_:
                    fix(other, f"{path} did not run and may read it")
                fix(dim, "not used when the model ran")
                whole.setdefault(dim.size, []).append(path)
        if found:
            r.params[path] = dims
            r.roles.update({(path, axis): "other" for axis in range(len(dims))})
            tied.append(path)
    notes = [f"{', '.join(tied)} did not run; cut with the width of that size around"] if tied else []
    notes += [f"{', '.join(paths)} did not run: widths of {n} around stay whole" for n, paths in whole.items()]
    for note in notes:
        r.graph.notes.append(note)
        logger.warning("%s; give an example that reads it to set_examples", note)


def _sibling(r: Relations, path: str) -> list[Dim] | None:
    """The axes that parameters of the same module and the same last axes have, where those that ran agree on them."""
    module, shape = path.rpartition(".")[0], r.graph.shapes[path]
    for lead in range(max(0, len(shape) - 1)):
        alike = [d for p, d in r.params.items() if p.rpartition(".")[0] == module and r.graph.shapes[p] == shape[lead:]]
        if len({tuple(map(find, dims)) for dims in alike}) == 1:
            return [*(fixed(n, "not used when the model ran") for n in shape[:lead]), *alike[0]]
    return None


def _outwards(path: str) -> Iterator[str]:
    """The modules around a parameter, the nearest first.

    Example:
        >>> list(_outwards("a.b.weight"))
        ['a.b', 'a', '']
    """
    while path:
        path = path.rpartition(".")[0]
        yield path


def _widths(r: Relations, scope: str) -> dict[int, list[Dim]]:
    """Size -> the different axes of that size that a module's own code, or its children's answers, showed."""
    numbers = set(r.graph.crossings.get(scope, ()))
    for node in r.graph.nodes:
        if node.scope == scope:
            numbers.update(i for i in (*node.inputs, *node.outputs) if i is not None)
    out: dict[int, list[Dim]] = {}
    for number in sorted(numbers):
        if r.graph.values[number].kind != "param":
            for dim in map(find, r.dims[number]):
                same = out.setdefault(dim.size, [])
                if not any(d is dim for d in same):
                    same.append(dim)
    return out
