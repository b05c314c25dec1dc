"""`slimkit convert`: checkpoints between PyTorch and MindSpore, adapters, and GGUF files into Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkit.cli import adapters, options
from slimkit.cli.session import session
from slimkit.core.errors import ConfigError

if TYPE_CHECKING:
    from slimkit.cli.session import Session
    from slimkit.core.convert.stream import ConvertReport

# What DST ends in where it is a file; a folder becomes a folder elsewhere.
_FILES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
# Between the names of a --name-map that become one tensor.
_JOIN = " + "


@options.spread
def convert(
    output: options.Writing,
    src: Annotated[
        Path,
        typer.Argument(
            help="safetensors, .ckpt, .pt/.pth/.bin, a sharded index, a Hugging Face directory, or .gguf.",
            show_default=False,
        ),
    ],
    dst: Annotated[
        Path,
        typer.Argument(
            help=".ckpt, .safetensors (MindSpore); .safetensors, .pt, .pth, .bin (torch); a folder for one or .gguf.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            autocompletion=options.words("torch", "mindspore", *adapters.LAYOUTS),
            help="torch or mindspore, where the endings leave it open; of an adapter peft, mindformers or megatron.",
            show_default=False,
        ),
    ] = None,
    name_map: Annotated[
        Path | None,
        typer.Option(
            "--name-map",
            help='JSON: name in SRC -> name in DST, or "re:PATTERN" -> replacement; a list splits, "a + b" joins.',
            show_default=False,
        ),
    ] = None,
    source_factory: Annotated[
        str | None,
        typer.Option(
            "--source-factory", metavar="MODULE:FUNCTION", help="Makes the network of SRC.", show_default=False
        ),
    ] = None,
    result_factory: Annotated[
        str | None,
        typer.Option(
            "--result-factory", metavar="MODULE:FUNCTION", help="Makes the network of DST.", show_default=False
        ),
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            "--example",
            metavar="SHAPE|FILE",
            help="Run both networks on it (1,3,224,224, or .npy/.npz) and compare their outputs.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="Convert these tensors alone.", show_default=False),
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Largest difference of the outputs accepted.")] = 1e-4,
    loose: Annotated[
        bool, typer.Option("--loose", help="Report tensors without a place instead of refusing them.")
    ] = False,
    no_manifest: Annotated[bool, typer.Option("--no-manifest", help="Do not write FILE.manifest.json.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            autocompletion=options.words("float32", "float16", "bfloat16"),
            help="Of the folder that a .gguf file becomes: float32 (all of a quantised number), float16, bfloat16.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Of an adapter's base: config.json or its folder.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="Shards that an adapter of Megatron is cut into.")
    ] = 1,
    apart: Annotated[
        bool, typer.Option("--apart", help="MindFormers' model holds query, key, value, gate and up apart.")
    ] = False,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Numerator of an adapter's scale, where no file says it.", show_default=False),
    ] = None,
) -> None:
    """Convert a checkpoint from PyTorch to MindSpore or back: names, layouts, and every value bit by bit.

    With both networks given, tensors are matched layer by layer; with --example the two networks are run and compared.
    safetensors and .ckpt files need neither framework. A directory becomes a directory: its shards, and beside them its
    configuration and tokenizer as they are. A .gguf file becomes a Hugging Face folder with its tokenizer. A LoRA
    adapter becomes one of PEFT, MindFormers or Megatron (MindSpeed), fused and cut into shards as that wants it.

    Example: slimkit convert model.safetensors model.ckpt

    Example: slimkit convert bert bert-ms --to mindspore

    Example: slimkit convert net.pt net.ckpt --source-factory nets.py:net --result-factory nets_ms.py:net
    --example 1,3,32,32

    Example: slimkit convert model.gguf FOLDER --dtype bfloat16

    Example: slimkit convert lora lora-megatron --to megatron --config llama --tensor-parallel 4
    """
    with session("convert", output) as talk:
        from slimkit.core.jobs import claim
        from slimkit.core.jobs.measurement import show

        talk.go_on = "nothing was written; give the same command again"
        if not src.exists():
            from slimkit.core import files

            raise ConfigError(f"SRC must be an existing file or folder. Received: {str(src)!r}{files.meant(src)}")
        of_adapters = {"--config": config, "--tensor-parallel": tensor_parallel > 1, "--apart": apart, "--alpha": alpha}
        if src.suffix == ".gguf":
            others = {
                "--to": to, "--name-map": name_map, "--source-factory": source_factory, "--example": example,
                "--result-factory": result_factory, "--only": only, "--loose": loose, "--no-manifest": no_manifest,
                **of_adapters,
            }  # fmt: skip
            _from_gguf(talk, src, dst, dtype or "float32", others, output)
            return
        if adapters.is_adapter(src, to):
            others = {
                "--name-map": name_map, "--source-factory": source_factory, "--result-factory": result_factory,
                "--example": example, "--only": only, "--no-manifest": no_manifest, "--dtype": dtype,
            }  # fmt: skip
            wanted = {
                "to": to, "config": config, "tensor_parallel": tensor_parallel, "fused": not apart, "alpha": alpha,
                "strict": not loose,
            }  # fmt: skip
            adapters.convert(talk, src, dst, wanted, others, output)
            return
        if given := [option for option, value in of_adapters.items() if value]:
            raise ConfigError(f"{given[0]} goes with an adapter: --to {', '.join(adapters.LAYOUTS)}")
        if dtype is not None:
            raise ConfigError("--dtype goes with a .gguf file; other checkpoints keep their types")
        if (source_factory is None) != (result_factory is None):
            raise ConfigError("--source-factory and --result-factory must be given together: each names a network")
        if example is not None and source_factory is None:
            raise ConfigError("--example needs --source-factory and --result-factory: the networks to run")
        nets = _networks(source_factory, result_factory)
        asked = {
            "to": to,
            "name_map": _name_map(name_map),
            "choice_func": _Only(only) if only else None,
            "strict": not loose,
        }
        how: dict[str, Any] = {"force": output.force, "dry_run": output.dry_run, "option": "DST"}
        whole = src.is_dir() and dst.suffix not in _FILES
        place = dst / "model.safetensors" if dst.is_dir() and not whole else dst
        with claim.claimed(place, file=not whole, reads=(src,), **how) as target:
            if target is None or only:
                found = _plan(src, place, nets, asked, whole=whole)
            if target is not None:
                found = _convert(
                    src, target, nets, asked, _inputs(example), not no_manifest, tolerance, whole=whole
                ).as_dict()
        renamed, relaid, gap = len(found["renamed"]), len(found["relaid"]), found["largest_difference"]
        if output.dry_run:
            talk.line(f"would convert to {found['to']}: {renamed} names change, {relaid} layouts")
        else:
            size = show(found["bytes_written"], "bytes")
            talk.line(f"Written: {place} ({size}) for {found['to']}: {renamed} names changed, {relaid} layouts")
        if gap is not None:
            talk.line(f"Largest difference between the two networks: {gap:.3g}")
        for key, what in (
            ("dropped", "left out"),
            ("initialised", "made new"),
            ("unused", "without a place"),
            ("missing", "without a source"),
            ("carried", "along as they are"),
            ("left", "not taken along"),
        ):
            if found[key]:
                talk.line(f"  {what}: {', '.join(found[key][:5])}{' ...' if len(found[key]) > 5 else ''}")
        if output.verbose:
            talk.table("Names", ("in the source", "in the result"), list(found["renamed"].items()))
        talk.result({"src": src, "dst": dst, **found}, dry_run=output.dry_run)


def _from_gguf(
    talk: Session, src: Path, dst: Path, dtype: str, others: dict[str, Any], output: options.Writing
) -> None:
    """The command for a GGUF file, which becomes a folder."""
    from slimkit.core.convert import gguffile
    from slimkit.core.jobs import claim
    from slimkit.core.jobs.measurement import show

    if given := [option for option, value in others.items() if value]:
        raise ConfigError(f"{given[0]} does not go with a .gguf file, which becomes a Hugging Face folder")
    dry_run = output.dry_run
    with claim.claimed(dst, force=output.force, dry_run=dry_run, reads=(src,), option="DST") as folder:
        if folder is None:
            report = gguffile.planned(src, dst, dtype, replace=output.force)[1]
        else:
            from slimkit.convert import convert_gguf

            report = convert_gguf(src, folder, dtype=dtype, replace=output.force)
    types = ", ".join(f"{count} {kind}" for kind, count in report.types.items())
    size = "" if dry_run else f" ({show(report.bytes_written, 'bytes')})"
    talk.line(
        f"{'would write' if dry_run else 'Written:'} {report.path}{size}: {report.architecture} in {report.dtype}, "
        f"{show(report.parameters, 'parameters')} parameters out of {types}"
    )
    with_template = " with its chat template" if report.chat_template else " without a chat template"
    talk.line(
        "  tokenizer" + with_template if report.tokenizer else "  the file holds no tokenizer, so the folder has none"
    )
    talk.result({"src": src, "dst": dst, **report.as_dict()}, dry_run=dry_run)


def _networks(source: str | None, result: str | None) -> tuple[Any, Any]:
    from slimkit.core.jobs.sources import found

    return tuple(
        None if r is None else found(r, o)() for r, o in ((source, "--source-factory"), (result, "--result-factory"))
    )  # type: ignore[return-value]


def _name_map(path: Path | None) -> dict[Any, Any] | None:
    """The map as `convert_checkpoint` takes it; JSON has no tuples, so names to be joined have " + " between them."""
    from slimkit.core.files import read_json

    if path is None:
        return None
    value = read_json(path, "--name-map")
    if not isinstance(value, dict) or not all(isinstance(v, (str, list, dict)) for v in value.values()):
        raise ConfigError(f"--name-map must hold a JSON object of names. Received: {str(path)!r}")
    return {tuple(name.split(_JOIN)) if _JOIN in name else name: new for name, new in value.items()}


class _Only:
    """The tensors that --only names; it remembers what it was asked, so that a glob that matched nothing is known."""

    def __init__(self, globs: list[str]) -> None:
        from slimkit.core.match import matcher

        self._tests = {glob: matcher(glob) for glob in globs}
        self._names: list[str] = []

    def __call__(self, name: str) -> bool:
        self._names.append(name)
        return any(test(name) for test in self._tests.values())

    def refuse(self) -> None:
        """ConfigError for globs that no tensor has met."""
        from slimkit.core import check

        idle = [glob for glob, test in self._tests.items() if not any(map(test, self._names))]
        if idle and self._names:
            raise ConfigError(f"--only: no tensor of SRC is named {check.nears(idle, self._names)}")


def _inputs(example: str | None) -> Any:
    from slimkit.core.jobs.sources import parse_example, read_arrays

    if example is None:
        return None
    return read_arrays(Path(example)) if Path(example).exists() else parse_example(example)


def _torch() -> Any:
    """PyTorch, only where a file of its own format is read or written."""
    from slimkit.core.lazy import imported

    return imported("torch")


def _convert(
    src: Path,
    dst: Path,
    nets: tuple[Any, Any],
    asked: dict[str, Any],
    inputs: Any,
    manifest: bool,
    tolerance: float,
    *,
    whole: bool,
) -> ConvertReport:
    """Convert a file, or with `whole` a directory and what lies beside its weights."""
    from slimkit.core.convert import stream
    from slimkit.core.jobs.converting import convert_folder

    work = convert_folder if whole else stream.convert
    return work(
        src, dst, source_net=nets[0], result_net=nets[1], inputs=inputs, with_manifest=manifest, torch=_torch,
        judge=_judge(tolerance), **asked,
    )  # fmt: skip


def _judge(tolerance: float) -> Callable[[float], None]:
    def judge(gap: float) -> None:
        if not gap <= tolerance:
            raise ConfigError(f"the two networks differ by {gap:.3g}, more than --tolerance {tolerance:g}")

    return judge


def _plan(src: Path, dst: Path, nets: tuple[Any, Any], asked: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """What a conversion would do: the same plan from names and shapes, no value read and nothing written."""
    from slimkit.core.errors import PatternError

    only = asked["choice_func"]
    try:
        found = _planned(src, dst, nets, asked, whole=whole)
    except PatternError:
        if only is not None:
            only.refuse()
        raise
    if only is not None:
        only.refuse()
    return found


def _planned(src: Path, dst: Path, nets: tuple[Any, Any], asked: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    from slimkit.core.checkpoint.openweights import open_weights
    from slimkit.core.checkpoint.torchfile import TorchFile
    from slimkit.core.convert.moves import plan_conversion
    from slimkit.core.convert.stream import ConvertReport, direction_of

    if whole:
        from slimkit.core.jobs.converting import convert_folder

        how: dict[str, Any] = {"inputs": None, "with_manifest": False, "torch": _torch, "plan_only": True}
        return convert_folder(src, dst, source_net=nets[0], result_net=nets[1], **how, **asked).as_dict()
    chosen = {k: asked[k] for k in ("name_map", "choice_func", "strict")}
    with open_weights(src, lambda p: TorchFile(p, _torch()), "src") as source:
        to = direction_of(source, dst, asked["to"], *nets)
        job = plan_conversion(source, to, *nets, **chosen)
    return ConvertReport(to, **job.report, path=str(dst)).as_dict()
