"""The methods of a class that read a parameter, edited to read it masked."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from slimkit.core.errors import UnsupportedError
from slimkit.core.source.generated import method_from


def masked_methods(kind: type, key: str, mask: str, library: str) -> dict[str, Any]:
    """Methods that read ``self.key * self.mask`` wherever the class's own read ``self.key``.

    Args:
        kind: the class.
        key: the parameter's name.
        mask: the name of an attribute that holds ones and zeros.
        library: the framework's package; its classes and their bases are left out.

    Returns:
        name -> method, for those methods that read the parameter.

    Raises:
        UnsupportedError: no method reads it, or one that does cannot be edited.
    """
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for owner in kind.__mro__:
        if owner.__module__.startswith(f"{library}.") or owner is object:
            break
        for name, function in vars(owner).items():
            if name in seen or name.startswith("__") or not inspect.isfunction(function):
                continue
            seen.add(name)
            if key in function.__code__.co_names:
                found[name] = _edited(owner, function, key, mask)
    found = {name: method for name, method in found.items() if method is not None}
    if not found:
        raise UnsupportedError(f"no method of {kind.__name__} reads self.{key}")
    return found


def _edited(owner: type, function: Any, key: str, mask: str) -> Any:
    what = f"{function.__name__} of {owner.__name__}, which reads self.{key},"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        raise UnsupportedError(f"{what} has no source") from None
    method = tree.body[0]
    if not isinstance(method, ast.FunctionDef) or method.decorator_list:
        raise UnsupportedError(f"{what} is decorated")
    if "__class__" in function.__code__.co_freevars:
        raise UnsupportedError(f"{what} calls super()")
    editor = _Masked(method.args.args[0].arg, key, mask)
    editor.visit(method)
    if not editor.edits:
        return None  # an attribute of something else has the same name
    _plain_signature(method)
    made = ast.ClassDef(name=owner.__name__, bases=[], keywords=[], body=[method], decorator_list=[])
    if "type_params" in ast.ClassDef._fields:  # Python 3.12
        setattr(made, "type_params", [])  # noqa: B010  (an older Python's class has no such field)
    return method_from(ast.unparse(ast.fix_missing_locations(made)), owner.__name__, function)


def _plain_signature(method: ast.FunctionDef) -> None:
    """Leave out what a signature evaluates: annotations, and defaults, which the function is given back."""
    arguments = method.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    for argument in every:
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if d is None else ast.Constant(None) for d in arguments.kw_defaults]
    method.returns = None


class _Masked(ast.NodeTransformer):
    """Puts a product with the mask wherever the attribute is read."""

    def __init__(self, owner: str, key: str, mask: str) -> None:
        self._owner, self._key, self._mask = owner, key, mask
        self.edits = 0

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """Edit one attribute."""
        self.generic_visit(node)
        mine = isinstance(node.value, ast.Name) and node.value.id == self._owner and node.attr == self._key
        if not mine or not isinstance(node.ctx, ast.Load):
            return node
        self.edits += 1
        mask = ast.Attribute(ast.Name(self._owner, ast.Load()), self._mask, ast.Load())
        return ast.BinOp(node, ast.Mult(), mask)
