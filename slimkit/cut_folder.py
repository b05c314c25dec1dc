"""`cut_checkpoint`: a smaller transformer's folder cut out of a large one's, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.core import check, files
from slimkit.core.checkpoint import openweights, stepwise
from slimkit.core.checkpoint.weightfile import Entry
from slimkit.core.errors import PlanError
from slimkit.core.files import PathLike
from slimkit.core.jobs.folders import copy_companions
from slimkit.core.showing import Report
from slimkit.core.weights.blocks import PruneConfig
from slimkit.core.weights.cut import plan_weights, take
from slimkit.stored import empty_model
from slimkit.torchfile import TorchWeightFile

REPORT = "cut_report.json"


def cut_checkpoint(
    src: PathLike, dst: PathLike, fields: Mapping[str, Any], config: PruneConfig, *, strict: bool = True
) -> Report:
    """Cut a smaller transformer out of a Hugging Face folder of any size, one tensor of it in memory at a time.

    As `prune_model_weight` into a model of the same class with other sizes, and that model saved: the same bits. Whole
    shards wait until all are there; a run that is killed goes on when called again, and ends in the same bytes.

    Args:
        src: directory with config.json and weights: .safetensors or PyTorch's .bin, in one file or in shards.
        dst: directory for the result, absent or holding an unfinished run of the same job.
        fields: of the configuration, with the values that make the smaller model: {"num_hidden_layers": 6}.
        config: the steps, the blocks and the selection, as for `prune_model_weight`.
        strict: refuse a tensor that nothing takes; False reports them. A parameter that nothing feeds is always
            refused: a folder has no values to leave it.

    Returns:
        The report of `prune_model_weight`; also in ``dst/cut_report.json``. And "bytes": what this call has read and
        written.

    Raises:
        ArgumentTypeError: an argument of the wrong type.
        ConfigError, PatternError: fields, steps and blocks do not fit each other or the files; another process is at
            work in `dst`.
        PlanError: names or shapes do not fit.
        ArgumentError: `dst` holds something else.
        UnsupportedError: "importance" cannot find the attention heads, or `dst` was begun with other inputs.
        FileFormatError: a file is damaged or missing.

    Example:
        >>> import tempfile, transformers
        >>> home = tempfile.mkdtemp()
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32}
        >>> large = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=3, **sizes))
        >>> large.save_pretrained(home + "/large")
        >>> blocks = PruneConfig().set_steps(["prune_blocks"]).add_blocks_params(r"layers.(\\d+).", {0: 0, 1: 2})
        >>> report = cut_checkpoint(home + "/large", home + "/small", {"num_hidden_layers": 2}, blocks)
        >>> len(report["dropped"])
        9
    """
    source, target = files.as_path(src, "src"), files.as_path(dst, "dst")
    check.instance(fields, Mapping, "fields", "a dict of fields of the configuration")
    check.instance(config, PruneConfig, "config")
    check.boolean(strict, "strict")
    stepwise.another_folder(source, target)
    spec = config.spec()
    model = empty_model(source, cache=True, fields=fields)
    job = {
        "source": stepwise.identity(_weight_files(source)),
        "config": files.digest_file(source / "config.json"),
        "fields": dict(fields),
        "steps": {**asdict(spec), "activations": _digests(spec.activations)},
        "strict": strict,
    }
    with openweights.open_weights(source, TorchWeightFile, "src") as weights:

        def begin(_state: Path) -> stepwise.Work:
            structure, settings = bridge.structure(model), openweights.source_config(source)
            plan = plan_weights(structure, weights, spec, settings, strict=strict)
            if plan.report["initialised"]:
                lacking = plan.report["initialised"]
                raise PlanError(
                    f"{len(lacking)} parameters of the smaller model have no tensor in the files, such as "
                    f"{lacking[0]!r}"
                )
            entries = {
                name: Entry(weights.entries[origin].dtype, tuple(structure.targets[name].shape))
                for name, origin in plan.feeds.items()
            }

            def make(shard: stepwise.Shard) -> Iterable[tuple[str, Any]]:
                for name in shard.entries:
                    index, origin = plan.index[name], plan.feeds[name]
                    whole = all(kept is None for kept in index)
                    yield name, weights.piece(origin) if whole else take(weights.raw(origin), index)

            def rest(finished: Path) -> dict[str, Any]:
                own: Any = model.config
                own.save_pretrained(str(finished))
                copy_companions(source, finished)
                return dict(plan.report)

            return stepwise.Work(stepwise.shared_out(entries), make, rest)

        return Report("weights", stepwise.write_folder(target, _weight_files(source), job, begin, REPORT))


def _weight_files(source: Path) -> list[Path]:
    found = openweights.locate(source, "src")
    if not found.name.endswith(".json"):
        return [found]
    return [found.parent / name for name in openweights.shard_names(openweights.read_index(found))]


def _digests(activations: Mapping[str, Any] | None) -> dict[str, str] | None:
    return None if activations is None else {name: files.digest_array(a) for name, a in activations.items()}
