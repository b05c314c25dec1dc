"""Attention written out in the source of a method, and the same method with a prefix in front of keys and values."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Iterator

from slimkit.core.errors import UnsupportedError

_PRODUCTS = ("matmul", "bmm", "batch_matmul", "batchmatmul", "batch_mat_mul")
# What leaves a column of scores what it was: nothing that stands beside the scores has to grow with them.
_HARMLESS = (
    "cast", "astype", "to", "float", "half", "type_as", "softmax", "dropout", "tanh", "clip", "clamp", "neg", "exp",
    "identity", "contiguous", "maximum", "minimum",
)  # fmt: skip
_NEUTRAL = {"add": 0, "sub": 0, "subtract": 0, "tensor_add": 0, "mul": 1, "multiply": 1, "div": 1, "truediv": 1}
_ROWS = "slimkit_prefix_rows"


class NoAttentionError(UnsupportedError):
    """The source holds no attention that can be extended; the message says what is missing."""


def with_prefix(source: str, class_name: str, transposed: Callable[[str], bool] = lambda name: False) -> str:
    """A method's source with a prefix in front of the keys and values of its attention.

    The method must multiply queries with keys, pass the scores through a softmax, and multiply the result with the
    values, each by a call or operator of its own: ``matmul(softmax(matmul(q, k) * scale + mask), v)``, in one line or
    many. The new source calls four methods of the object: ``prefix_rows()``, ``prefix_keys(keys, transposed, rows)``,
    ``prefix_values(values, rows)`` and ``prefix_mask(mask, neutral)``, the last on all that is added to the scores or
    masks them, which has to grow by columns that change nothing.

    Args:
        source: the method's source, as `inspect.getsource` gives it.
        class_name: the class it stands in, for names that begin with two underscores.
        transposed: whether an operator held as an attribute multiplies with its transposed second factor.

    Returns:
        A class of that name with the method in it.

    Raises:
        NoAttentionError: the source is not of this form.

    Example:
        >>> print(with_prefix("def f(self, q, k, v): return softmax(q @ k.T + self.bias) @ v", "C"))
        class C:
        <BLANKLINE>
            def f(self, q, k, v):
                slimkit_prefix_rows = self.prefix_rows()
                return softmax(q @ self.prefix_keys(k.T, False, slimkit_prefix_rows) + self.prefix_mask(self.bias, 0)) \
@ self.prefix_values(v, slimkit_prefix_rows)
    """
    method = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(method, ast.FunctionDef):
        raise NoAttentionError("it is no plain method")
    softmax, scores, mixing = _find(method)
    editor = _Editor(softmax, scores, mixing, transposed)
    for i, statement in enumerate(list(method.body)):
        edited = editor.visit(statement)
        assert isinstance(edited, ast.stmt)
        method.body[i] = edited
    start = 1 if ast.get_docstring(method) is not None else 0
    method.body.insert(start, ast.parse(f"{_ROWS} = self.prefix_rows()").body[0])
    _plain_signature(method)
    made = ast.ClassDef(name=class_name, bases=[], keywords=[], body=[method], decorator_list=[])
    if "type_params" in ast.ClassDef._fields:  # Python 3.12
        setattr(made, "type_params", [])  # noqa: B010  (an older Python's class has no such field)
    return ast.unparse(ast.fix_missing_locations(made))


def calls_softmax(source: str) -> bool:
    """Whether a method calls a softmax."""
    return "softmax" in source and any(_is_softmax(n) for n in ast.walk(ast.parse(textwrap.dedent(source))))


def _plain_signature(method: ast.FunctionDef) -> None:
    """Leave out what the signature would evaluate anew: annotations, defaults (set on the function), decorators."""
    arguments = method.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    for star in (arguments.vararg, arguments.kwarg):
        if star is not None:
            star.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if d is None else ast.Constant(None) for d in arguments.kw_defaults]
    method.returns, method.decorator_list = None, []


def _name(node: ast.AST) -> str:
    """The last word of what is called: "matmul" of `ops.matmul(...)` and of `ops.MatMul()(...)`, in lower case."""
    target = node.func if isinstance(node, ast.Call) else node
    while isinstance(target, ast.Call):
        target = target.func
    if isinstance(target, ast.Attribute):
        return target.attr.lower()
    return target.id.lower() if isinstance(target, ast.Name) else ""


def _is_softmax(node: ast.AST) -> bool:
    word = _name(node)
    return isinstance(node, ast.Call) and word.endswith("softmax") and "log" not in word and _operand(node) is not None


def _operand(softmax: ast.Call) -> ast.expr | None:
    """What a softmax is taken of: its first argument, or where that is an axis the object it is a method of."""
    axis = not softmax.args or isinstance(softmax.args[0], (ast.Constant, ast.UnaryOp))
    if not axis:
        return softmax.args[0]
    return softmax.func.value if isinstance(softmax.func, ast.Attribute) else None


def _factors(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    """The two factors of a matrix product, or None."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return node.left, node.right
    if isinstance(node, ast.Call) and _name(node).strip("_") in _PRODUCTS:
        if len(node.args) >= 2:
            return node.args[0], node.args[1]
        if len(node.args) == 1 and isinstance(node.func, ast.Attribute):
            return node.func.value, node.args[0]  # q.matmul(k)
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement in the order of the text, those of branches and loops included."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, field, []))


def _own(statement: ast.stmt) -> list[ast.AST]:
    """The expressions of a statement itself, without the statements below it."""
    return [child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt)]


def _targets(statement: ast.stmt) -> set[str]:
    """The names that a statement assigns."""
    places = getattr(statement, "targets", [getattr(statement, "target", None)])
    return {n.id for place in places if place is not None for n in ast.walk(place) if isinstance(n, ast.Name)}


def _reached(body: list[ast.stmt], start: ast.AST) -> Iterator[tuple[ast.stmt, set[str]]]:
    """Every statement with the names that then hold a value computed from one node."""
    names: set[str] = set()
    for statement in _statements(body):
        yield statement, names
        value = getattr(statement, "value", None)
        if isinstance(value, ast.AST) and isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            if _mentions(value, start, names):
                names |= _targets(statement)
            elif isinstance(statement, ast.Assign) and statement in body:
                names -= _targets(statement)


def _mentions(node: ast.AST, start: ast.AST, names: set[str]) -> bool:
    return any(n is start or (isinstance(n, ast.Name) and n.id in names) for n in ast.walk(node))


def _flows(body: list[ast.stmt], start: ast.AST, goal: ast.expr) -> bool:
    """Whether a node's value reaches an expression."""
    for statement, names in _reached(body, start):
        if any(n is goal for part in _own(statement) for n in ast.walk(part)):
            return _mentions(goal, start, names)
    return False


def _find(method: ast.FunctionDef) -> tuple[ast.Call, ast.AST, ast.AST]:
    """The softmax, the product before it, and the product after it."""
    nodes = [n for s in _statements(method.body) for part in _own(s) for n in ast.walk(part)]
    found = [n for n in nodes if _is_softmax(n)]
    if len(found) != 1:
        raise NoAttentionError(f"it calls a softmax {len(found)} times, not once")
    softmax = found[0]
    assert isinstance(softmax, ast.Call)
    operand = _operand(softmax)
    assert operand is not None
    products = {id(n): n for n in nodes if _factors(n) is not None}.values()
    before = [p for p in products if _flows(method.body, p, operand)]
    last = [p for p in before if not any(o is not p and _flows_into(method.body, p, o) for o in before)]
    if len(last) != 1:
        raise NoAttentionError(f"{len(last)} matrix products (matmul, bmm, BatchMatMul, @) end in its softmax, not one")
    after = [p for p in products if (pair := _factors(p)) is not None and _flows(method.body, softmax, pair[0])]
    if not after:
        raise NoAttentionError("no matrix product takes what its softmax gives and multiplies it with the values")
    return softmax, last[0], after[0]


def _flows_into(body: list[ast.stmt], start: ast.AST, product: ast.AST) -> bool:
    return any(_flows(body, start, factor) for factor in _factors(product) or ())


class _Editor(ast.NodeTransformer):
    """Extends keys and values at the two products, and whatever meets the scores on their way to the softmax."""

    def __init__(self, softmax: ast.AST, scores: ast.AST, mixing: ast.AST, transposed: Callable[[str], bool]) -> None:
        self.softmax, self.scores, self.mixing, self.transposed = softmax, scores, mixing, transposed
        self.names: set[str] = set()  # variables that hold scores
        self.on: set[int] = set()  # nodes that are scores
        self.kept: list[ast.AST] = []  # keeps the nodes alive, so that no id comes twice

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Name):
            return self._mark(node) if isinstance(node.ctx, ast.Load) and node.id in self.names else node
        made: ast.AST = self.generic_visit(node)
        if node is self.scores:
            return self._mark(self._extend_keys(made))
        if node is self.mixing:
            return self._replace(made, 1, lambda value: _call("prefix_values", value, ast.Name(_ROWS, ast.Load())))
        if node is self.softmax:
            return made  # what comes out is no score any more
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            return self._assign(made)
        if isinstance(node, ast.BinOp):
            return self._binary(made)
        if isinstance(node, ast.Call):
            return self._called(made)
        if isinstance(node, (ast.UnaryOp, ast.IfExp, ast.Subscript, ast.Attribute)):
            return self._mark(made) if any(id(c) in self.on for c in ast.iter_child_nodes(made)) else made
        return made

    def _mark(self, node: ast.AST) -> ast.AST:
        self.on.add(id(node))
        self.kept.append(node)
        return node

    def _extend_keys(self, node: ast.AST) -> ast.AST:
        turned = False
        if isinstance(node, ast.Call):
            words = [*node.keywords, *(node.func.keywords if isinstance(node.func, ast.Call) else [])]
            turned = any(k.arg == "transpose_b" and getattr(k.value, "value", False) is True for k in words)
            function = node.func
            if isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "self":
                turned = turned or self.transposed(function.attr)
        rows = ast.Name(_ROWS, ast.Load())
        return self._replace(node, 1, lambda keys: _call("prefix_keys", keys, ast.Constant(turned), rows))

    def _replace(self, node: ast.AST, index: int, change: Callable[[ast.expr], ast.expr]) -> ast.AST:
        if isinstance(node, ast.BinOp):
            node.right = change(node.right)
        elif isinstance(node, ast.Call):
            index = index if len(node.args) > 1 else 0
            node.args[index] = change(node.args[index])
        return node

    def _assign(self, node: ast.AST) -> ast.AST:
        value = getattr(node, "value", None)
        held = value is not None and id(value) in self.on
        if isinstance(node, ast.AugAssign) and not held:
            if _targets(node) & self.names and value is not None:
                node.value = self._pad(value, 0 if isinstance(node.op, (ast.Add, ast.Sub)) else 1)
            return node
        assert isinstance(node, ast.stmt)
        self.names = self.names | _targets(node) if held else self.names - _targets(node)
        return node

    def _binary(self, node: ast.AST) -> ast.AST:
        assert isinstance(node, ast.BinOp)
        left, right = id(node.left) in self.on, id(node.right) in self.on
        if not left and not right:
            return node
        neutral = 0 if isinstance(node.op, (ast.Add, ast.Sub)) else 1
        if not right:
            node.right = self._pad(node.right, neutral)
        if not left:
            node.left = self._pad(node.left, neutral)
        return self._mark(node)

    def _called(self, node: ast.AST) -> ast.AST:
        assert isinstance(node, ast.Call)
        receiver = node.func.value if isinstance(node.func, ast.Attribute) else None
        places = ([receiver] if receiver is not None and id(receiver) in self.on else []) + list(node.args)
        if not any(id(place) in self.on for place in places):
            return node
        word = _name(node).strip("_")
        first = len(node.args) - len(places) + 1  # 1 where the scores are an argument, 0 where they are the receiver
        if word == "masked_fill":
            node.args[first] = self._pad(node.args[first], False)
        elif word in ("where", "select") and len(node.args) == 3:
            node.args[0] = self._pad(node.args[0], id(node.args[1]) in self.on)
            others = [i for i in (1, 2) if id(node.args[i]) not in self.on]
            for i in others:
                node.args[i] = self._pad(node.args[i], 0)
        elif word in _NEUTRAL:
            node.args = [a if id(a) in self.on else self._pad(a, _NEUTRAL[word]) for a in node.args]
        elif word not in _HARMLESS and not word.endswith(("dropout", "cast")):
            raise NoAttentionError(f"its scores pass through {ast.unparse(node.func)}(...), which may mask them")
        return self._mark(node)

    def _pad(self, node: ast.expr, neutral: int | bool) -> ast.expr:
        return node if isinstance(node, ast.Constant) else _call("prefix_mask", node, ast.Constant(neutral))


def _call(method: str, *arguments: ast.expr) -> ast.expr:
    """A call of one of the object's own methods."""
    return ast.Call(ast.Attribute(ast.Name("self", ast.Load()), method, ast.Load()), list(arguments), [])
