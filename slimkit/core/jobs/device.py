"""Devices as a command line names them."""

from __future__ import annotations

import os

from slimkit.core import check
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import crew

KINDS = ("cpu", "cuda", "npu")


def parse_device(name: str) -> tuple[str, int]:
    """A device's kind and number; of several processes, each has its own where none is named.

    Raises:
        ConfigError: it is not cpu, cuda or npu, or what is behind the colon is no number.

    Example:
        >>> parse_device("npu:1"), parse_device("cuda")
        (('npu', 1), ('cuda', 0))
    """
    kind, colon, number = name.lower().partition(":")
    check.choice(kind, KINDS, "--device")
    if (colon and not number.isdecimal()) or (kind == "cpu" and colon):
        raise ConfigError(f"--device must be cpu, cuda, npu, cuda:NUMBER or npu:NUMBER. Received: {name!r}")
    return kind, int(number or (os.environ.get("LOCAL_RANK", "0") if crew.size() > 1 else 0))
