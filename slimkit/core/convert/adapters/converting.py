"""One adapter of one layout made one of another: what goes where, and what the other side has to be told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.checkpoint.openweights import base_config
from slimkit.core.convert.adapters import factors as f
from slimkit.core.convert.adapters import files as stored_files
from slimkit.core.convert.adapters.factors import Factors, Held
from slimkit.core.convert.adapters.files import FORMAT, LAYOUTS, VERSION, Stored
from slimkit.core.convert.adapters.names import BY_INPUT, Slot, path_of, slot_of, whole_of, wholes
from slimkit.core.delta import peft
from slimkit.core.delta.peft_held import pattern_value
from slimkit.core.errors import ArgumentError, FileFormatError, PlanError, UnsupportedError
from slimkit.core.showing import Shown

Array = np.ndarray[Any, Any]

# Options of PEFT under which the factors mean something else, or are not all there is.
_FOREIGN = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "velora_config", "kasa_config", "monteclora_config", "arrow_config",
    "target_parameters", "fan_in_fan_out",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class AdapterReport(Shown):
    """What a conversion of an adapter did.

    Args:
        layout: of the source.
        to: of the result.
        matrices: how many low-rank pairs the result has.
        rank: their rank; of a PEFT adapter the most common one.
        alpha: the scale is alpha over rank.
        tensor_parallel: into how many shards.
        notes: what to know before the files are used.
        left: tensors of the source that are no factors and were left behind.
        files: what was written.
        path: the folder.
    """

    layout: str
    to: str
    matrices: int
    rank: int
    alpha: float
    tensor_parallel: int = 1
    notes: tuple[str, ...] = ()
    left: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    path: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


@dataclass
class _Plain:
    """An adapter as PEFT has it: one pair for each matrix."""

    pairs: dict[Slot, Factors]
    config: dict[str, Any]

    def scaling(self, slot: Slot) -> float:
        path, rank = path_of(slot), len(self.pairs[slot][0])
        alpha = float(pattern_value(self.config.get("alpha_pattern"), path, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def convert_adapter(
    src: files.PathLike,
    dst: files.PathLike,
    *,
    to: str,
    config: Mapping[str, Any] | files.PathLike | None = None,
    tensor_parallel: int = 1,
    fused: bool = True,
    alpha: float | None = None,
    strict: bool = True,
) -> AdapterReport:
    """Turn a LoRA adapter of one layout into one of another: PEFT's, MindFormers' or Megatron's (MindSpeed).

    Query, key and value, and gate and up, become one matrix or several, tensor-parallel shards are joined or cut, and
    all values stay bit for bit. A record beside the files (slimkit_adapter.json) makes the way back exact: the same
    tensors and the same configuration. PyTorch is needed for Megatron's files alone.

    Args:
        src: PEFT's folder; a folder with mp_rank_00/model_optim_rng.pt ..., or with iter_* of them; a .ckpt or
            .safetensors file of MindFormers, or a folder with one.
        dst: the folder to write; other files in it are left alone.
        to: "peft", "mindformers" or "megatron".
        config: of the base, a dict or a Hugging Face folder: num_attention_heads and num_key_value_heads are needed
            where query, key and value are one matrix and no record says them.
        tensor_parallel: for how many processes Megatron's files are cut.
        fused: whether MindFormers' model holds w_qkv and w_gate_hidden (qkv_concat) or each matrix apart.
        alpha: numerator of the scale, of files that neither PEFT nor slimkit wrote.
        strict: refuse files that hold tensors other than factors; False leaves those behind and lists them.

    Returns:
        An `AdapterReport`; its notes say the rank and alpha that the other side must be told.

    Raises:
        ArgumentError: config or alpha is needed, or an argument is of a wrong value.
        PlanError: heads or sizes do not divide.
        UnsupportedError: DoRA, biases, heads, different scales, a matrix that has no place there, pipeline shards.
        FileFormatError: a file is damaged, or shards disagree. Nothing is written after an error.

    Example:
        >>> convert_adapter("lora", "lora-mg", to="megatron", config="llama", tensor_parallel=2)  # doctest: +SKIP
        AdapterReport(layout='peft', to='megatron', matrices=128, rank=24, alpha=48, tensor_parallel=2, ...)
    """
    check.choice(to, LAYOUTS, "to")
    check.positive(tensor_parallel, "tensor_parallel")
    check.boolean(fused, "fused")
    check.boolean(strict, "strict")
    if alpha is not None:
        check.number(alpha, "alpha")
    if tensor_parallel > 1 and to != "megatron":
        raise ArgumentError(f"tensor_parallel cuts adapters of Megatron alone. Received: to={to!r}")
    folder = files.as_path(dst, "dst")
    if folder.suffix in (".ckpt", ".safetensors", ".pt"):
        check.wrong_value("dst", "a folder", str(dst))
    if folder.resolve() == files.as_path(src, "src").resolve():
        raise ArgumentError(f"dst must be another folder than src. Received: {str(dst)!r}")
    source = stored_files.read(src)
    if source.left and (strict or source.layout == "peft"):
        shown = ", ".join(source.left[:3])
        raise UnsupportedError(
            f"{src} holds {len(source.left)} tensors that are no factors of a LoRA ({shown}"
            f"{' ...' if len(source.left) > 3 else ''})"
            + ("." if source.layout == "peft" else "; strict=False leaves them behind.")
        )
    settings = base_config(config)
    plain, notes = _plain(source, settings, alpha)
    result, more = _laid_out(plain, to, source, settings, tensor_parallel, fused=bool(fused))
    written = stored_files.write(folder, result)
    said = result.record or {"rank": plain.config["r"], "alpha": plain.config["lora_alpha"]}
    return AdapterReport(
        source.layout, to, len(result.shards[0]), said["rank"], said["alpha"], len(result.shards), (*notes, *more),
        source.left, written, str(folder),
    )  # fmt: skip


def _heads(settings: Mapping[str, Any], record: Mapping[str, Any] | None) -> tuple[int, int]:
    """Query heads, and key-value heads, which Megatron calls groups."""
    if record is not None and "num_attention_heads" not in settings:
        return int(record["heads"]), int(record["groups"])
    heads = settings.get("num_attention_heads")
    if heads is None:
        raise ArgumentError(
            "config must say num_attention_heads and num_key_value_heads, by which query, key and value lie in one "
            "matrix: a dict, or the base's folder."
        )
    heads = check.positive(heads, "config.num_attention_heads")
    groups = check.positive(settings.get("num_key_value_heads") or heads, "config.num_key_value_heads")
    if heads % groups:
        raise PlanError(f"{heads} query heads are no multiple of {groups} key-value heads.")
    return heads, groups


# --- to one pair for each matrix ---


def _plain(source: Stored, settings: Mapping[str, Any], alpha: float | None) -> tuple[_Plain, list[str]]:
    if source.layout == "peft":
        assert source.config is not None
        foreign = [o for o in _FOREIGN if source.config.get(o)]
        foreign += ["bias"] if source.config.get("bias", "none") != "none" else []
        init = str(source.config.get("init_lora_weights", True)).lower()
        foreign += ["init_lora_weights"] if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")) else []
        if foreign:
            raise UnsupportedError(f"the adapter uses {', '.join(foreign)}, which no other layout has a place for.")
        pairs = {}
        for path, pair in source.shards[0].items():
            slot = slot_of(path)
            if slot is None:
                raise UnsupportedError(f"{path!r} is none of the matrices that slimkit converts: {_KNOWN}.")
            pairs[slot] = pair
        return _Plain(pairs, dict(source.config)), []
    record, notes = source.record, list[str]()
    if record is None and alpha is None:
        raise ArgumentError("alpha must be given: the files hold the factors and not their scale.")
    held = {path: Held(*value) for path, value in record["modules"].items()} if record else {}
    mixtral = record["mixtral"] if record and "mixtral" in record else settings.get("model_type") == "mixtral"
    pairs, grown = {}, []
    for low, rows in _gathered(source, settings, mixtral=bool(mixtral)):
        if record is not None and len(low) != record["rank"]:
            raise FileFormatError(
                f"{path_of(next(iter(rows)))} has rank {len(low)}, where {stored_files.RECORD} says {record['rank']}: "
                "the files are another adapter's. Take the record away and give alpha."
            )
        for slot, high in rows.items():
            path = path_of(slot)
            if record is not None and path not in held and not np.any(high):
                continue  # it had no delta, and has none
            pairs[slot], own = f.parted(low, high, held.get(path))
            grown += [path] if record is not None and not own else []
    if not pairs:
        raise FileFormatError("the adapter changes nothing: every b is zero and none is recorded.")
    if record is not None and not grown:
        return _Plain(pairs, dict(record["config"])), notes
    if grown:
        notes.append(f"{len(grown)} matrices were trained beyond the factors they came with, and keep all: {grown[0]}")
    return _Plain(pairs, _made_config(pairs, record, alpha)), notes


_KNOWN = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj below model.layers, and Mixtral's experts"


def _gathered(
    source: Stored, settings: Mapping[str, Any], *, mixtral: bool
) -> Iterator[tuple[Array, dict[Slot, Array]]]:
    """Of each whole its a, and b's rows for each slot."""
    for name in source.shards[0]:
        whole = whole_of(name, source.layout, mixtral=mixtral)
        if whole is None:
            raise UnsupportedError(f"{name!r} is none of the matrices that slimkit converts.")
        lows, highs = ([shard[name][half] for shard in source.shards] for half in (0, 1))
        roles = [slot.role for slot in whole.slots]
        if whole.place in BY_INPUT:
            low, rows = np.concatenate(lows, 1), {roles[0]: f.same(highs, f"b of {name}")}
        else:
            low = f.same(lows, f"a of {name}")
            heads, groups = _heads(settings, source.record) if len(roles) == 3 else (1, 1)
            _check_rows(name, sum(len(b) for b in highs), roles, heads, groups)
            if source.layout == "megatron":
                rows = f.gathered(highs, roles, groups, heads // groups)
            else:
                rows = dict(zip(roles, _plainly(highs[0], roles, heads, groups), strict=True))
        yield low, dict(zip(whole.slots, rows.values(), strict=True))


def _check_rows(name: str, rows: int, roles: list[str], heads: int, groups: int) -> None:
    parts = heads + 2 * groups if len(roles) == 3 else len(roles)
    if rows % parts:
        raise PlanError(f"{name} has {rows} outputs, which {parts} parts ({', '.join(roles)}) do not divide.")


def _plainly(rows: Array, roles: list[str], heads: int, groups: int) -> list[Array]:
    """Query, key and value one after the other, as MindFormers has them; or equal parts."""
    if len(roles) != 3:
        return np.split(rows, len(roles))
    width = len(rows) // (heads + 2 * groups)
    return np.split(rows, [heads * width, (heads + groups) * width])


def _made_config(
    pairs: Mapping[Slot, Factors], record: Mapping[str, Any] | None, alpha: float | None
) -> dict[str, Any]:
    """A PEFT configuration for pairs whose scale is one number over the rank they had together."""
    base = dict(record["config"]) if record else {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    ranks = {path_of(slot): len(a) for slot, (a, _) in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    whole = record["alpha"] / record["rank"] if record else float(alpha or 0) / rank
    odd = {path: r for path, r in ranks.items() if r != rank}
    for key in ("rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform", "layers_pattern"):
        base.pop(key, None)
    return {
        **base,
        "r": rank,
        "lora_alpha": _whole_number(whole * rank),
        "rank_pattern": odd,
        "alpha_pattern": {path: _whole_number(whole * r) for path, r in odd.items()},
        "target_modules": sorted({path.rpartition(".")[2] for path in ranks}),
        "inference_mode": True,
    }


def _whole_number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


# --- to another layout ---


def _laid_out(
    plain: _Plain, to: str, source: Stored, settings: Mapping[str, Any], count: int, *, fused: bool
) -> tuple[Stored, list[str]]:
    if to == "peft":
        shard = {path_of(slot): pair for slot, pair in plain.pairs.items()}
        return Stored("peft", [shard], source.dtype, plain.config), []
    scales = {slot: plain.scaling(slot) for slot in plain.pairs}
    first = next(iter(scales))
    odd = next((slot for slot, scale in scales.items() if not math.isclose(scale, scales[first])), None)
    if odd is not None:
        raise UnsupportedError(
            f"{to} has one alpha and one rank for all matrices; {path_of(odd)} is scaled by {scales[odd]:g}, "
            f"{path_of(first)} by {scales[first]:g}."
        )
    if to == "mindformers" and any(slot.expert is not None for slot in plain.pairs):
        raise UnsupportedError("how MindFormers names the factors of experts is not known; convert to 'megatron'.")
    made = wholes(list(plain.pairs), to, fused=fused)
    needs = any(len(w.slots) == 3 for w in made)
    heads, groups = _heads(settings, source.record) if needs else (1, 1)
    if needs and to == "megatron" and groups % count:
        raise PlanError(f"{groups} key-value heads cannot be cut among {count} processes.")
    joined: dict[str, tuple[Array, dict[str, Array]]] = {}
    modules: dict[str, list[int]] = {}
    for whole in made:
        parts = {s.role: plain.pairs[s] for s in whole.slots if s in plain.pairs}
        low, high, held = f.joined(parts, _rows(whole.slots, parts, heads, groups))
        joined[whole.name] = low, high
        modules.update({path_of(s): list(held[s.role]) for s in whole.slots if s.role in held})
    rank = max(len(low) for low, _ in joined.values())
    shards: list[dict[str, Factors]] = [{} for _ in range(count)]
    for whole in made:
        low, rows = joined[whole.name]
        filled = {role: f.padded((low, b), rank) for role, b in rows.items()}
        low, high = next(iter(filled.values()))[0], {role: b for role, (_, b) in filled.items()}
        roles = [slot.role for slot in whole.slots]
        for i, pair in enumerate(_cut(whole.place, whole.name, low, high, roles, to, groups, count)):
            shards[i][whole.name] = pair
    alpha = _whole_number(round(scales[first] * rank, 12))
    record = {
        "format": FORMAT, "version": VERSION, "layout": to, "tensor_parallel": count, "heads": heads, "groups": groups,
        "rank": rank, "alpha": alpha, "mixtral": any(s.mixtral for s in plain.pairs), "config": plain.config,
        "modules": dict(sorted(modules.items())),
    }  # fmt: skip
    told = {
        "megatron": f"--lora-r {rank} --lora-alpha {alpha:g}",
        "mindformers": f"lora_rank={rank}, lora_alpha={alpha:g}",
    }
    notes = [f"load it with {told[to]}"]
    stacked = [w.name for w in made if any(modules[path_of(s)][1] for s in w.slots if path_of(s) in modules)]
    if stacked:
        notes.append(f"{len(stacked)} matrices hold several a's one after the other, with zeros between: {stacked[0]}")
    lesser = sum(len(low) < rank for low, _ in joined.values())
    if lesser:
        notes.append(f"{lesser} matrices were filled up with zeros to rank {rank}, which is one for all there")
    return Stored(to, shards, source.dtype, None, record), notes


def _rows(slots: tuple[Slot, ...], parts: Mapping[str, Factors], heads: int, groups: int) -> dict[str, int]:
    """Outputs of every role of a whole, also of those without a delta."""
    known = {role: len(b) for role, (_, b) in parts.items()}
    roles = [slot.role for slot in slots]
    if len(roles) == 3:
        sizes = {"query": heads, "key": groups, "value": groups}
        role = next(iter(known))
        width, rest = divmod(known[role], sizes[role])
        wanted = {r: n * width for r, n in sizes.items()}
        if rest or any(wanted[r] != n for r, n in known.items()):
            raise PlanError(
                f"{path_of(slots[0])} and its neighbours have {known} outputs, which {heads} query heads and {groups} "
                "key-value heads do not divide."
            )
        return wanted
    if len(set(known.values())) > 1:
        raise PlanError(f"{path_of(slots[0])} and its neighbours differ in their outputs: {known}.")
    return dict.fromkeys(roles, next(iter(known.values())))


def _cut(
    place: str, name: str, low: Array, high: Mapping[str, Array], roles: list[str], to: str, groups: int, count: int
) -> list[Factors]:
    if to == "mindformers":
        return [(low, np.concatenate([high[role] for role in roles], 0))]
    size = low.shape[1] if place in BY_INPUT else min(len(b) for b in high.values())
    if size % count:
        raise PlanError(f"{name}: {size} {'inputs' if place in BY_INPUT else 'outputs'} cannot be cut among {count}.")
    if place in BY_INPUT:
        return [(part, high[roles[0]]) for part in np.split(low, count, axis=1)]
    return [(low, rows) for rows in f.shards(high, roles, groups, count)]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter of one of these layouts rather than a model, by the names of its files."""
    if not path.is_dir():
        return False
    if peft.is_adapter(path) or (path / stored_files.RECORD).exists():
        return True
    return any(path.glob("mp_rank_*")) or any(path.glob("iter_*/mp_rank_*"))
