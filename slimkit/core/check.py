"""Argument validators: each returns the value it was given, or names the argument, what is allowed and what came."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any, NoReturn, TypeVar

from slimkit.core.errors import ArgumentError, ArgumentTypeError

T = TypeVar("T")


def _shown(value: Any) -> str:
    # A path is shown as the user wrote it, alone and in a list.
    if isinstance(value, PurePath):
        value = str(value)
    elif type(value) in (list, tuple) and any(isinstance(item, PurePath) for item in value):
        value = [str(item) if isinstance(item, PurePath) else item for item in value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def wrong_type(name: str, allowed: str, value: Any) -> NoReturn:
    """Raise the TypeError of the house: which argument, what is allowed, what came."""
    raise ArgumentTypeError(f"{name} must be {allowed}. Received: {_shown(value)} ({type(value).__name__})")


def wrong_value(name: str, allowed: str, value: Any) -> NoReturn:
    """Raise the ValueError of the house: which argument, what is allowed, what came."""
    raise ArgumentError(f"{name} must be {allowed}. Received: {_shown(value)}")


def instance(value: T, kinds: type | tuple[type, ...], name: str, allowed: str | None = None) -> T:
    """Refuse a value of another type; bool never passes for int.

    Example:
        >>> instance("a", str, "pattern")
        'a'
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
        wrong_type(name, allowed or " or ".join(k.__name__ for k in kinds), value)
    return value


def boolean(value: Any, name: str) -> bool:
    """Refuse anything but True and False."""
    return instance(value, bool, name, "a bool")


def integer(value: Any, name: str, minimum: int | None = None, maximum: int | None = None) -> int:
    """Refuse anything but an int within the bounds (inclusive); bool is not an int.

    Example:
        >>> integer(8, "rank", minimum=1)
        8
    """
    instance(value, int, name, "an int")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        bounds = [f"at {word} {bound}" for word, bound in (("least", minimum), ("most", maximum)) if bound is not None]
        wrong_value(name, "an int of " + " and ".join(bounds), value)
    return int(value)


def positive(value: Any, name: str) -> int:
    """Refuse anything but an int of at least 1."""
    return integer(value, name, minimum=1)


def number(value: Any, name: str, minimum: float | None = None) -> float:
    """Refuse anything but a finite int or float."""
    instance(value, (int, float), name, "a number")
    if not math.isfinite(value) or (minimum is not None and value < minimum):
        wrong_value(name, "finite" if minimum is None else f"finite and at least {minimum}", value)
    return value


def ratio(value: Any, name: str, *, zero: bool = False, one: bool = False) -> float:
    """Refuse anything but a float between 0 and 1; `zero` and `one` say whether the ends are allowed.

    Example:
        >>> ratio(1.0, "reserved_ratio", one=True)
        1.0
    """
    instance(value, (int, float), name, "a float")
    inside = (0 < value < 1) or (zero and value == 0) or (one and value == 1)
    if not inside:
        wrong_value(name, f"in {'[' if zero else '('}0, 1{']' if one else ')'}", value)
    return float(value)


def text(value: Any, name: str) -> str:
    """Refuse anything but a non-empty str that UTF-8 can write."""
    instance(value, str, name, "a str")
    if not value:
        wrong_value(name, "a non-empty str", value)
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which no file of ours can hold
        wrong_value(name, "a str that can be written as UTF-8", ascii(value))
    return str(value)


def choice(value: Any, allowed: Iterable[Any], name: str) -> Any:
    """Refuse anything that is not one of `allowed`, offering the nearest.

    Example:
        >>> choice("l1", ("l1", "l2"), "importance")
        'l1'
    """
    options = list(allowed)
    if options and all(isinstance(o, str) for o in options):
        instance(value, str, name, "a str")
    if value not in options:
        raise ArgumentError(
            f"{name} must be one of {', '.join(map(repr, options))}. Received: {_shown(value)}{near(value, options)}"
        )
    return value


def strings(value: Any, name: str) -> list[str]:
    """Refuse anything but a non-empty list (or tuple) of str; returns a copy as a list."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) for v in value):
        wrong_type(name, "a non-empty list of str", value)
    return list(value)


def function(value: Any, name: str) -> Callable[..., Any]:
    """Refuse anything that cannot be called."""
    if not callable(value):
        wrong_type(name, "callable", value)
    return value


# Words of PEFT and of transformers' trainer -> ours.
FOREIGN = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
    "rank_pattern": "ranks",
    "alpha_pattern": "alphas",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "also_train",
    "adapter_name": "name",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "max_grad_norm": "gradient_clip_norm",
    "warmup_steps": "warmup",
    "lr_scheduler_type": "schedule",
    "optim": "optimizer",
}


def near(value: Any, options: Sequence[Any]) -> str:
    """'. Did you mean ...?' for the nearest option, or the empty string.

    Example:
        >>> near("hesian", ["hessian", "par"])
        ". Did you mean 'hessian'?"
        >>> near("lora_alpha", ["rank", "alpha"]), near("q_prj", ["layers.0.q_proj", "layers.1.q_proj"])
        (". Did you mean 'alpha'?", ". Did you mean '*.q_proj'?")
    """
    found = _nearest(str(value), [str(o) for o in options])
    return f". Did you mean {found!r}?" if found else ""


def nears(values: Sequence[Any], options: Sequence[Any]) -> str:
    """Several wrong names, and the nearest option of each in one sentence.

    Example:
        >>> nears(["hesian", "pa", "zzz"], ["hessian", "par"])
        "'hesian', 'pa', 'zzz'. Did you mean 'hessian', 'par'?"
    """
    names = [str(o) for o in options]
    found = dict.fromkeys(one for value in values if (one := _nearest(str(value), names)))
    meant = f". Did you mean {', '.join(map(repr, found))}?" if found else ""
    return ", ".join(map(repr, values)) + meant


def nearest(text: str, names: Sequence[str]) -> str:
    """The name that is spelt most like a text, or the empty string.

    Example:
        >>> nearest("brt", ["bert", "gpt2"]), nearest("llama", ["bert"])
        ('bert', '')
    """
    return next(iter(difflib.get_close_matches(text, names, n=1, cutoff=0.6)), "")


def _nearest(text: str, names: Sequence[str]) -> str:
    """The name that a wrong one stands for: another library's word for it, a near spelling, or the end of paths."""
    if FOREIGN.get(text) in names:
        return FOREIGN[text]
    if close := nearest(text, names):
        return close
    ends = sorted({name.rpartition(".")[2] for name in names if "." in name})
    wanted = text.rpartition(".")[2] if "*" in text else text
    close = nearest(wanted, ends)
    return f"*.{close}" if close else ""


def framework_of(value: Any) -> str | None:
    """'torch', 'mindspore' or 'numpy' by the class names of a value, importing none of them.

    Example:
        >>> framework_of([1]) is None
        True
    """
    for kind in type(value).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in ("torch", "mindspore", "numpy"):
            return root
    return None
