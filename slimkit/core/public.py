"""The table of public names: room -> name -> the module that holds it. Both doors, the tests and the docs read it."""

from __future__ import annotations

# A home that begins with "core." is shared by both wings; any other is a module of each wing.
ROOMS: dict[str, dict[str, str]] = {
    "prune": {
        "Pruner": "prune",
        "PruneTorch": "prune",
        "PruneMindSpore": "prune",
        "save_pruned": "pruned",
        "load_pruned": "pruned",
        "prune_checkpoint": "pruned_folder",
        "merge_desc": "core.prune.merging",
        "measure_latency": "latency",
        "LatencyTable": "core.prune.latency",
        "register_operator_rule": "operators",
        "OperatorCall": "core.prune.custom",
        "check_pruning": "proof",
        "PruningCheck": "core.prune.proof",
        "migrate_optimizer": "optimizers",
        "OptimizerReport": "core.prune.optimizer_state",
        "Criterion": "core.prune.criteria",
        "PruneConfig": "core.weights.blocks",
        "prune_model_weight": "weights",
        "cut_checkpoint": "cut_folder",
        "suggest_layer_map": "weights",
        "measure_activations": "weights",
        "LayerSuggestion": "core.weights.influence",
    },
    "sparse": {
        "SparseConfig": "core.sparse",
        "SparseMethod": "core.sparse",
        "SparseProblem": "core.sparse.maths.solvers",
        "register_sparse_method": "core.sparse",
        "Compressor": "sparse",
        "freeze_zeros": "sparse",
        "FrozenZeros": "sparse",
        "sparsify_checkpoint": "sparse",
    },
    "distill": {
        "KnowledgeDistillConfig": "core.distill.config",
        "DistillDualModels": "distill",
        "get_distill_model": "distill",
        "TeacherCache": "distill",
        "VocabularyMap": "core.distill.vocabulary",
        "make_student": "students",
    },
    "compare": {
        "compare_models": "compare",
        "Comparison": "core.compare.comparison",
    },
    "calib": {
        "calibration": "calib",
        "CalibrationSet": "core.calibration.sets",
        "own_text": "calib",
        "OwnText": "core.calibration.own",
    },
    "delta": {
        "LoRADense": "delta",
        "AdapterDense": "delta",
        "AdapterLayer": "delta",
        "LowRankAdapterDense": "delta",
        "LowRankAdapterLayer": "delta",
        "PrefixLayer": "delta",
        "PrefixEncoder": "delta",
        "PromptTuning": "delta",
        "RDropLoss": "delta",
        "rdrop_repeat": "delta",
        "DeltaReport": "core.delta.spec",
        "apply_delta": "delta",
        "merge_delta": "delta",
        "merge_checkpoint": "delta",
        "unmerge_delta": "delta",
        "remove_delta": "delta",
        "set_delta": "delta",
        "disable_delta": "delta",
        "combine_delta": "delta",
        "compress_delta": "delta",
        "lora_plus_groups": "delta",
        "save_delta": "delta",
        "load_delta": "delta",
    },
    "freeze": {
        "freeze_modules": "freeze",
        "freeze_delta": "freeze",
        "freeze_from_config": "freeze",
        "ModelFreezer": "freeze",
        "trainable_summary": "freeze",
        "FreezeReport": "core.freeze",
    },
    "checkpoint": {
        "TrainableParamsCheckPoint": "checkpoint",
        "CheckpointConfig": "checkpoint",
        "save_checkpoint": "checkpoint",
        "load_checkpoint": "checkpoint",
        "load_param_into_net": "checkpoint",
        "LoadReport": "core.checkpoint.loading",
        "convert_checkpoint": "convert",
        "ConvertReport": "core.convert.stream",
        "convert_adapter": "core.convert.adapters",
        "AdapterReport": "core.convert.adapters",
        "convert_gguf": "convert",
        "GgufReport": "core.convert.gguffile",
        "save_delta": "delta",
        "load_delta": "delta",
    },
    "train": {
        "Trainer": "train",
        "RunHistory": "core.train.history",
        "InMemoryRunHistory": "core.train.history",
        "TrainerRunConfig": "core.train.history",
        "TrainerCallback": "core.train.callbacks",
        "Checkpoints": "core.train.callbacks",
        "EarlyStopping": "core.train.callbacks",
        "GradualUnfreezing": "core.train.callbacks",
        "CSVLogger": "core.train.runlog",
        "JSONLogger": "core.train.runlog",
        "ProgressBar": "core.train.runlog",
        "TensorBoardLogger": "core.train.runlog",
        "constant_schedule": "core.train.schedules",
        "cosine_schedule": "core.train.schedules",
        "linear_schedule": "core.train.schedules",
    },
    "export": {
        "export_onnx": "export",
        "export_mindir": "export",
    },
    "ascend": {
        "check_onnx": "core.ascend",
        "check_adapter": "core.ascend",
        "check_served": "core.ascend",
        "AdapterCheck": "core.ascend",
        "ServedCheck": "core.ascend",
        "OnnxCheck": "core.ascend",
        "padded_waste": "core.ascend",
        "save_w16a16s": "ascend",
        "load_w16a16s": "core.ascend",
        "save_w8a8s": "ascend",
        "load_w8a8s": "core.ascend",
        "emulate_w8a8s": "ascend",
    },
}

# Names offered by the package top that belong to no room.
TOP: dict[str, str] = {
    "load": "opening",
    "Loaded": "core.run.opening",
    "set_logger_level": "core.log",
    "SlimkitError": "core.errors",
    "ArgumentTypeError": "core.errors",
    "ArgumentError": "core.errors",
    "ConfigError": "core.errors",
    "PatternError": "core.errors",
    "GraphError": "core.errors",
    "PlanError": "core.errors",
    "UnsupportedError": "core.errors",
    "MissingFrameworkError": "core.errors",
    "FileFormatError": "core.errors",
    "LinkPathError": "core.errors",
    "AbsolutePathError": "core.errors",
    "ReadYamlFileError": "core.errors",
    "ShardError": "core.delta.shard",
    "ModelConfigFreezeInfoError": "core.errors",
}

# Names that one wing alone offers, and why.
ONLY: dict[str, tuple[str, str]] = {
    "CheckpointConfig": ("slimkit", "MindSpore has its own class of that name, and slimkit_ms takes it"),
    "PruneTorch": ("slimkit", "named after its framework; Pruner is the name that both share"),
    "PruneMindSpore": ("slimkit_ms", "named after its framework; Pruner is the name that both share"),
    "convert_gguf": ("slimkit", "transformers reads a GGUF file's tokenizer with PyTorch alone; both read the folder"),
    "export_mindir": ("slimkit_ms", "MINDIR is MindSpore's own format"),
    "merge_checkpoint": ("slimkit", "reads models of transformers, which MindSpore cannot build"),
    "cut_checkpoint": ("slimkit", "reads models of transformers, which MindSpore cannot build"),
    "prune_checkpoint": ("slimkit", "reads models of transformers, which MindSpore cannot build"),
}


def homes(package: str, room: str | None = None) -> dict[str, str]:
    """Names that a package top (or one of its rooms) offers, each with the module that holds it.

    Args:
        package: "slimkit" or "slimkit_ms".
        room: a key of ROOMS, or None for the package top.

    Returns:
        name -> module, "core.x" for the shared core, "x" for a module of the wing.

    Example:
        >>> homes("slimkit", "train")["RunHistory"]
        'core.train.history'
    """
    tables = [ROOMS[room]] if room else [*ROOMS.values(), TOP]
    return {
        name: home for table in tables for name, home in table.items() if name not in ONLY or ONLY[name][0] == package
    }


def stub(package: str) -> str:
    """Text of the package's `__init__.pyi`: what type checkers and editors read, since they do not run the doors.

    Args:
        package: "slimkit" or "slimkit_ms".

    Returns:
        one re-export a public name, sorted by module and name.

    Example:
        >>> "from slimkit.prune import PruneTorch as PruneTorch" in stub("slimkit")
        True
    """
    found = sorted(
        (f"slimkit.{home}" if home.startswith("core.") else f"{package}.{home}", name)
        for name, home in homes(package).items()
    )
    return "\n".join(
        [
            "# Written by `python tools/stubs.py` from slimkit/core/public.py; a test holds it current.",
            "",
            *(f"from {module} import {name} as {name}" for module, name in found),
            "",
            "__version__: str",
            "",
        ]
    )
