"""The lowest versions that setup.cfg promises, as exact pins for pip.

    python tools/lowest.py [EXTRA ...]

Prints `NAME==VERSION` for each requirement with a lower bound, of the base and of the extras named.
"""

from __future__ import annotations

import configparser
import re
import sys
from collections.abc import Sequence
from pathlib import Path

SETUP = Path(__file__).resolve().parents[1] / "setup.cfg"


def pins(extras: Sequence[str], setup: Path = SETUP) -> list[str]:
    """The pins, base requirements first.

    Args:
        extras: names under `options.extras_require`.
        setup: the file.
    """
    told = configparser.ConfigParser()
    told.read(setup, encoding="utf-8")
    lines = told["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += told["options.extras_require"][extra].splitlines()
    found = [re.match(r"\s*([\w.-]+)\s*>=\s*([\w.]+)\s*(;.*)?$", line) for line in lines]
    return [f"{one[1]}=={one[2]}{' ' + one[3] if one[3] else ''}" for one in found if one]


if __name__ == "__main__":
    print("\n".join(pins(sys.argv[1:])))
