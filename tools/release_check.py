"""Build the wheel and the sdist twice, compare them, and try the wheel in clean environments.

    python tools/release_check.py [--frameworks neither torch mindspore] [--keep FOLDER]

Each environment is a fresh venv that gets the wheel and one framework (or none) under constraints.txt, and then a smoke
test from an empty folder: the wing it can use works, the other one says in one line what is missing. Prints one JSON
object; exit code 1 when a check fails. TORCH_INDEX may name an extra pip index with CPU builds of torch.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {"neither": [], "torch": ["torch"], "mindspore": ["mindspore"]}
# 2020-02-02: any fixed moment that zip can hold; the commit's own time where there is one.
FALLBACK_EPOCH = "1580601600"

SMOKE = {
    "neither": """
        import slimkit, slimkit_ms
        from slimkit.core.run.recipe import parse_recipe
        from slimkit.core.sparse import SparseConfig
        from slimkit import check_onnx, MissingFrameworkError
        stages = [{"prune": {"reserved_ratio": 0.5}}]
        parse_recipe({"version": 1, "name": "x", "model": "m.py:f", "data": "m.py:d", "stages": stages})
        SparseConfig(sparse_ratio=0.5)
        for package, name in ((slimkit, "Pruner"), (slimkit_ms, "Pruner")):
            try:
                getattr(package, name)
            except MissingFrameworkError as error:
                assert "pip install" in str(error)
            else:
                raise AssertionError(name)
    """,
    "torch": """
        import torch, slimkit, slimkit_ms
        nn = torch.nn
        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        x = torch.randn(64, 8)
        left = sum(p.numel() for p in net.parameters())
        slimkit.Pruner(net, x).set_alignment(8).prune(0.6)
        assert sum(p.numel() for p in net.parameters()) < left
        slimkit.Compressor(net, slimkit.SparseConfig(method="hessian", min_tokens=1)).compress([x])
        slimkit.apply_delta(net, "lora", ["2"], rank=2)
        slimkit.freeze_delta(net, "lora")
        slimkit.Trainer(net, torch.nn.functional.mse_loss).train([(x, torch.zeros(64, 4))], 1)
        slimkit.save_delta(net, "delta")
        try:
            slimkit_ms.Pruner
        except slimkit.MissingFrameworkError as error:
            assert "pip install" in str(error)
        else:
            raise AssertionError("MindSpore is here")
    """,
    "mindspore": """
        import numpy, mindspore as ms, slimkit, slimkit_ms
        ms.set_device("CPU"); ms.runtime.launch_blocking()
        nn = ms.nn
        net = nn.SequentialCell(nn.Dense(8, 32), nn.ReLU(), nn.Dense(32, 32), nn.ReLU(), nn.Dense(32, 4))
        x = ms.Tensor(numpy.random.default_rng(0).standard_normal((64, 8)).astype(numpy.float32))
        left = sum(p.size for p in net.get_parameters())
        slimkit_ms.Pruner(net, x).set_alignment(8).prune(0.6)
        assert sum(p.size for p in net.get_parameters()) < left
        slimkit_ms.Compressor(net, slimkit_ms.SparseConfig(method="hessian", min_tokens=1)).compress([x])
        slimkit_ms.apply_delta(net, "lora", ["2"], rank=2)
        slimkit_ms.freeze_delta(net, "lora")
        slimkit_ms.Trainer(net, ms.nn.MSELoss()).train([(x, ms.ops.zeros((64, 4)))], 1)
        slimkit_ms.save_delta(net, "delta")
        try:
            slimkit.Pruner
        except slimkit.MissingFrameworkError as error:
            assert "pip install" in str(error)
        else:
            raise AssertionError("torch is here")
    """,
}


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(str(c) for c in command)[:300]}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def epoch() -> str:
    """The last commit's time, so that the same source gives the same archives."""
    found = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or FALLBACK_EPOCH


def steady(archive: Path, moment: int) -> None:
    """Rewrite a .tar.gz in place with one time, one owner and sorted members; setuptools leaves the clock's in it."""
    with tarfile.open(archive) as source:
        members = [(m, source.extractfile(m).read() if m.isfile() else None) for m in source.getmembers()]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as target:
        for member, content in sorted(members, key=lambda pair: pair[0].name):
            member.mtime, member.uid, member.gid, member.uname, member.gname, member.pax_headers = (
                moment,
                0,
                0,
                "",
                "",
                {},
            )
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            target.addfile(member, None if content is None else io.BytesIO(content))
    with open(archive, "wb") as handle, gzip.GzipFile("", "wb", mtime=moment, fileobj=handle) as zipped:
        zipped.write(packed.getvalue())


def build(folder: Path) -> dict[str, str]:
    """Build both archives from a copy of what git tracks; returns file name -> SHA-256."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in run("git", "ls-files", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools.build_meta import *; build_sdist({str(folder)!r}); build_wheel({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=source, SOURCE_DATE_EPOCH=epoch(), PYTHONHASHSEED="0")
    for archive in folder.glob("*.tar.gz"):
        steady(archive, int(epoch()))
    built = [f for f in sorted(folder.iterdir()) if f.is_file()]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in built}


def try_wheel(wheel: Path, framework: str, folder: Path) -> None:
    """Install the wheel into a fresh environment and run the smoke test there."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    extras = f"[{','.join(EXTRAS[framework])}]" if EXTRAS[framework] else ""
    pip = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
        "--no-compile",
        "-c",
        ROOT / "constraints.txt",
    ]
    if index := os.environ.get("TORCH_INDEX"):
        pip += ["--extra-index-url", index]
    if framework == "torch":
        run(*pip, "torch")
    run(*pip, f"{wheel}{extras}")
    place = folder / "empty"
    place.mkdir()
    run(python, "-c", textwrap.dedent(SMOKE[framework]), cwd=place, PYTHONPATH="")
    run(folder / "venv" / "bin" / "slimkit", "--version", cwd=place, PYTHONPATH="")
    run(python, "-m", "slimkit", "--help", cwd=place, PYTHONPATH="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="*", choices=list(EXTRAS), default=list(EXTRAS))
    parser.add_argument("--keep", type=Path, help="leave the two archives here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        first, second = (build(Path(place, name)) for name in ("one", "two"))
        found = {"digests": first, "reproducible": first == second, "tried": []}
        wheel = next(Path(place, "one").glob("*.whl"))
        for framework in options.frameworks:
            try_wheel(wheel, framework, Path(place, framework))
            found["tried"].append(framework)
            print(f"{framework}: installed from the wheel and tried", file=sys.stderr)
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            for name in first:
                (options.keep / name).write_bytes(Path(place, "one", name).read_bytes())
    print(json.dumps(found, indent=2))
    sys.exit(0 if found["reproducible"] else 1)


if __name__ == "__main__":
    main()
