"""The dimension algebra: axes as expressions over dimension variables, and what it means that two axes are equal.

A `Dim` is one of four things. FREE is a variable of n indices that nothing has split yet. FIXED is an axis that is
never pruned, with the reason. PRODUCT is a flattened axis (heads by head size), its first part outermost. SUM is an
axis put together end to end (a concatenation, a fused qkv). Equal axes are *unified*: union-find over the nodes, where
a variable is split only when another expression demands it. All structure is shared by reference, so a split is seen
wherever the variable occurs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from slimkit.core.errors import GraphError

FREE, FIXED, PRODUCT, SUM = range(4)


class Dim:
    """One axis expression; compare and read it only through `find`.

    Args:
        size: number of indices.
        kind: FREE, FIXED, PRODUCT or SUM.
        parts: the factors (outermost first) or terms of a PRODUCT or SUM.
        reason: why a FIXED one is never pruned.
        elastic: a FREE one made by broadcasting: every index holds the same, and it takes any size.
        inner: a FREE one that is the inner size of a product of two activations, such as an attention head's.
    """

    __slots__ = ("elastic", "inner", "kind", "link", "parts", "reason", "size")

    def __init__(
        self, size: int, kind: int = FREE, parts: tuple[Dim, ...] = (), reason: str = "", elastic: bool = False
    ) -> None:
        self.size = size
        self.kind = kind if size > 1 else FIXED
        self.parts = parts
        self.reason = reason
        self.elastic = elastic
        self.inner = False
        self.link: Dim | None = None

    def __repr__(self) -> str:
        root = find(self)
        if root.kind == FREE:
            return f"{root.size}?"
        if root.kind == FIXED:
            return str(root.size)
        return "(" + ("*" if root.kind == PRODUCT else "+").join(map(repr, root.parts)) + ")"


ONE = Dim(1, FIXED)


def fixed(size: int, reason: str) -> Dim:
    """An axis that is never pruned.

    Example:
        >>> fixed(3, "input")
        3
    """
    return Dim(size, FIXED, reason=reason) if size != 1 else ONE


def find(dim: Dim) -> Dim:
    """The node that stands for everything unified with `dim`."""
    root = dim
    while root.link is not None:
        root = root.link
    while dim.link is not None:
        dim.link, dim = root, dim.link
    return root


def leaves(dim: Dim) -> Iterator[Dim]:
    """The FREE and FIXED nodes an expression is made of, outermost or first ones first; repeats included."""
    dim = find(dim)
    if dim.parts:
        for part in dim.parts:
            yield from leaves(part)
    else:
        yield dim


def fix(dim: Dim, reason: str) -> None:
    """Declare that no index of an axis is ever pruned; the first reason given stays.

    Example:
        >>> d = Dim(4); fix(d, "output"); find(d).reason
        'output'
    """
    dim = find(dim)
    if dim.kind == FREE:
        dim.kind, dim.reason = FIXED, reason
    elif dim.parts:
        for part in dim.parts:
            fix(part, reason)


def product(parts: Iterable[Dim]) -> Dim:
    """The axis that flattening several gives, outermost first.

    Example:
        >>> product([Dim(2), ONE, fixed(3, "kernel")])
        (2?*3)
    """
    return _compose(PRODUCT, [p for p in map(find, parts) if p.size != 1])


def total(parts: Iterable[Dim]) -> Dim:
    """The axis that putting several end to end gives.

    Example:
        >>> total([Dim(2), Dim(3)])
        (2?+3?)
    """
    return _compose(SUM, [p for p in map(find, parts) if p.size != 0])


def _compose(kind: int, parts: list[Dim]) -> Dim:
    if len(parts) == 1:
        return parts[0]
    size = 1 if kind == PRODUCT else 0
    for part in parts:
        size = size * part.size if kind == PRODUCT else size + part.size
    if all(p.kind == FIXED for p in parts):
        return fixed(size, next((p.reason for p in parts if p.reason), ""))
    if kind == PRODUCT:
        # A broadcast axis that is then flattened is a repetition (GQA's repeated heads): its number is written in
        # the code.
        for part in parts:
            if part.kind == FREE and part.elastic:
                fix(part, "number of repetitions")
    flat = [q for p in parts for q in (p.parts if p.kind == kind else (p,))]
    return Dim(size, kind, tuple(flat))


def _expand(dim: Dim, kind: int) -> list[Dim]:
    """The factors or terms of a root, nested ones opened."""
    dim = find(dim)
    if dim.kind != kind:
        return [dim]
    return [q for p in dim.parts for q in _expand(p, kind)]


def factor(dim: Dim, outer: int) -> tuple[Dim, Dim] | None:
    """Write an axis as a product of an outer and an inner one, splitting variables where it must.

    Args:
        dim: the axis.
        outer: size of the outer factor; it must divide the axis.

    Returns:
        (outer, inner), or None where no such expression exists.

    Example:
        >>> d = Dim(12); factor(d, 3), d
        ((3?, 4?), (3?*4?))
    """
    dim = find(dim)
    if dim.size % outer:
        return None
    inner = dim.size // outer
    if outer == 1:
        return ONE, dim
    if inner == 1:
        return dim, ONE
    if dim.kind == FIXED:
        return fixed(outer, dim.reason), fixed(inner, dim.reason)
    if dim.kind == FREE:
        pair = Dim(outer, elastic=dim.elastic), Dim(inner, elastic=dim.elastic)
        pair[0].inner = pair[1].inner = dim.inner
        dim.kind, dim.parts = PRODUCT, pair
        return pair
    return _factor_product(dim, outer) if dim.kind == PRODUCT else _factor_sum(dim, inner)


def _factor_product(dim: Dim, outer: int) -> tuple[Dim, Dim] | None:
    parts, done = _expand(dim, PRODUCT), 1
    for place, part in enumerate(parts):
        if done == outer:
            return product(parts[:place]), product(parts[place:])
        if done * part.size > outer:
            pair = factor(part, outer // done) if outer % done == 0 else None
            if pair is None:
                return None
            return product([*parts[:place], pair[0]]), product([pair[1], *parts[place + 1 :]])
        done *= part.size
    return None


def _factor_sum(dim: Dim, inner: int) -> tuple[Dim, Dim] | None:
    parts = _expand(dim, SUM)
    if all(p.size % inner == 0 for p in parts):
        pairs = [factor(p, p.size // inner) for p in parts]
        if any(p is None for p in pairs):
            return None
        first = next(p for p in pairs if p)[1]
        for pair in pairs:
            unify(pair[1], first)  # type: ignore[index]
        result = total([p[0] for p in pairs if p]), find(first)
    else:
        # Terms gather into equal stretches, as when two halves are concatenated and then seen as (2, n / 2).
        stretches: list[list[Dim]] = [[]]
        for part in parts:
            if sum(p.size for p in stretches[-1]) == inner:
                stretches.append([])
            stretches[-1].append(part)
        if any(sum(p.size for p in s) != inner for s in stretches):
            return None
        first, *rest = [total(s) for s in stretches]
        for other in rest:
            unify(other, first)
        result = fixed(len(stretches), "number of equal parts"), find(first)
    dim = find(dim)
    if dim.kind == SUM:
        whole = product(result)
        dim.kind, dim.parts, dim.reason = whole.kind, whole.parts, whole.reason
        if not whole.parts:  # every part turned out to be fixed
            dim.kind = FIXED
    return result


def cut(dim: Dim, at: int) -> tuple[Dim, Dim] | None:
    """Write an axis as a sum of its first `at` indices and the rest, splitting variables where it must.

    Example:
        >>> d = Dim(12); cut(d, 5), d
        ((5?, 7?), (5?+7?))
    """
    dim = find(dim)
    if at == 0 or at == dim.size:
        return (fixed(0, ""), dim) if at == 0 else (dim, fixed(0, ""))
    if dim.kind == FIXED:
        return fixed(at, dim.reason), fixed(dim.size - at, dim.reason)
    if dim.kind == FREE:
        pair = Dim(at, elastic=dim.elastic), Dim(dim.size - at, elastic=dim.elastic)
        pair[0].inner = pair[1].inner = dim.inner
        dim.kind, dim.parts = SUM, pair
        return pair
    if dim.kind == SUM:
        parts, done = _expand(dim, SUM), 0
        for place, part in enumerate(parts):
            if done == at:
                return total(parts[:place]), total(parts[place:])
            if done + part.size > at:
                halves = cut(part, at - done)
                if halves is None:
                    return None
                return total([*parts[:place], halves[0]]), total([halves[1], *parts[place + 1 :]])
            done += part.size
        return None
    first, *rest = _expand(dim, PRODUCT)
    inner = product(rest)
    if at % inner.size:
        return None
    halves = cut(first, at // inner.size)
    return halves and (product([halves[0], inner]), product([halves[1], inner]))


def divided(dim: Dim, places: Iterable[int]) -> list[Dim]:
    """The terms of an axis that cutting it at some places would divide.

    Example:
        >>> divided(total([Dim(4), Dim(8)]), [4, 6])
        [8?]
    """
    out, done = [], 0
    for part in _expand(dim, SUM):
        if any(done < place < done + part.size for place in places):
            out.append(part)
        done += part.size
    return out


def unify(a: Dim, b: Dim) -> None:
    """Declare that two axes are the same, index by index.

    Args:
        a: an axis.
        b: another of the same size.

    Raises:
        GraphError: their sizes differ, which only a wrong rule or tracer can cause.

    Example:
        >>> heads, size, axis = Dim(4), Dim(8), Dim(32)
        >>> unify(product([heads, size]), axis); fix(size, "head size"); axis
        (4?*8)
    """
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise GraphError(f"two axes that must be equal have sizes {a.size} and {b.size}")
    if a.kind == FIXED or b.kind == FIXED:
        if a.kind != FIXED:
            a, b = b, a
        fix(b, a.reason)
        b.link = a
        return
    if a.kind == FREE or b.kind == FREE:
        if a.kind != FREE:
            a, b = b, a
        if a.inner or not a.elastic:
            for leaf in leaves(b):
                leaf.inner = leaf.inner or a.inner
                leaf.elastic = leaf.elastic and a.elastic
        a.link = b
        return
    if a.kind == PRODUCT and b.kind == PRODUCT:
        done = _pair(_expand(a, PRODUCT), _expand(b, PRODUCT), factor)
    elif a.kind == SUM and b.kind == SUM:
        done = _pair(_expand(a, SUM), _expand(b, SUM), cut)
    else:
        if a.kind != PRODUCT:
            a, b = b, a
        # The sum takes the product's form, which is the finer one wherever it exists.
        done = factor(b, _expand(a, PRODUCT)[0].size) is not None
        if done:
            unify(a, b)
    if not done:
        for dim in (a, b):
            fix(dim, "regrouped in a way that no expression can say")
    a, b = find(a), find(b)
    if a is not b:
        a.link = b


def _pair(left: list[Dim], right: list[Dim], divide: object) -> bool:
    """Unify two lists of factors (divide = factor) or terms (divide = cut), splitting the longer one at each step."""
    left, right = left[::-1], right[::-1]
    while left and right:
        x, y = find(left.pop()), find(right.pop())
        if x.size == y.size:
            unify(x, y)
            continue
        if x.size < y.size:
            x, y, left, right = y, x, right, left
        halves = divide(x, y.size)  # type: ignore[operator]
        if halves is None:
            return False
        unify(halves[0], y)
        left.append(halves[1])
    return True


def same(a: Dim, b: Dim, why: str = "axes of unequal size") -> Dim:
    """Unify two axes where their sizes allow it; otherwise both stay whole."""
    if a.size == b.size:
        unify(a, b)
    else:
        fix(a, why)
        fix(b, why)
    return a
