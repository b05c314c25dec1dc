"""Write `__init__.pyi` of both packages from the table of public names: python tools/stubs.py"""

from __future__ import annotations

from pathlib import Path

from slimkit.core.public import stub

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    for package in ("slimkit", "slimkit_ms"):
        (ROOT / package / "__init__.pyi").write_text(stub(package), encoding="utf-8")
