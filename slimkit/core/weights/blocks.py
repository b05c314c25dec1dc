"""Transformer weight pruning: what to do (PruneConfig), and which blocks stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimkit.core import check
from slimkit.core.errors import ArgumentError, ConfigError, PatternError
from slimkit.core.match import bounded_regex
from slimkit.core.showing import Shown
from slimkit.core.weights.activations import checked

STEPS = ("prune_blocks", "prune_bert_intra_block")
SELECTIONS = ("first", "importance")


@dataclass(frozen=True)
class BlocksParams:
    """One stack of blocks: the pattern that finds a block's number in a name, and new number -> number in the file."""

    pattern: str
    layer_id_map: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PruneSpec:
    """What a PruneConfig says, as plain values."""

    steps: tuple[str, ...] = ()
    blocks: tuple[BlocksParams, ...] = ()
    selection: str = "first"
    head_size: int | None = None
    activations: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Refuse a spec that lacks what its steps need, or says what no step will read."""
        if not self.steps:
            raise ConfigError(f"PruneConfig.set_steps must name at least one of {', '.join(map(repr, STEPS))}.")
        if ("prune_blocks" in self.steps) != bool(self.blocks):
            raise ConfigError(
                "PruneConfig: the step 'prune_blocks' needs add_blocks_params(pattern, layer_id_map), and the other "
                f"way round. Received: steps {list(self.steps)} with {len(self.blocks)} blocks params"
            )


@dataclass
class PruneConfig(Shown):
    """How the weights of a large transformer become those of a smaller one; every setter returns the config.

    Example:
        >>> config = PruneConfig().set_steps(["prune_blocks", "prune_bert_intra_block"])
        >>> config = config.add_blocks_params(r"encoder.layer.(\\d+).", {0: 0, 1: 2, 2: 5}).set_selection("importance")
        >>> config.spec().selection
        'importance'
    """

    _spec: PruneSpec = field(default_factory=PruneSpec, init=False)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        yield from vars(self._spec).items()

    def set_steps(self, steps: Sequence[str]) -> PruneConfig:
        """Say what is done, in which order.

        Args:
            steps: a non-empty list out of "prune_blocks" (drop whole blocks, renumber the others) and
                "prune_bert_intra_block" (cut heads, FFN channels, embedding columns, any axis, to the model's size).

        Returns:
            This config.

        Raises:
            ArgumentTypeError: not a non-empty list of str.
            ArgumentError: another step, or one named twice.
        """
        given = check.strings(steps, "steps")
        for step in given:
            check.choice(step, STEPS, "steps")
        if len(set(given)) != len(given):
            check.wrong_value("steps", "without repeats", steps)
        return self._with(steps=tuple(given))

    def add_blocks_params(self, pattern: str, layer_id_map: Mapping[int, int]) -> PruneConfig:
        """Add one stack of blocks for the step "prune_blocks"; an encoder and a decoder are two calls.

        Args:
            pattern: regular expression, found anywhere in a parameter's name, whose first group is the block's number,
                as ``"bert.encoder.layer.(\\d+)."``. Bounded: 500 characters, nothing that can backtrack without end.
            layer_id_map: number of the block in the model -> number of the block in the file.

        Returns:
            This config.

        Raises:
            ArgumentTypeError: not a str, or not a dict of ints.
            ArgumentError: an empty map or a negative number.
            PatternError: the pattern is not valid, not safe, or has no group.
        """
        if bounded_regex(pattern, "pattern").groups < 1:
            raise PatternError(f"pattern must hold a group for the block's number, as '(\\d+)'. Received: {pattern!r}")
        check.instance(layer_id_map, Mapping, "layer_id_map", "a dict {new block: block in the file}")
        if not layer_id_map:
            check.wrong_value("layer_id_map", "a non-empty dict {new block: block in the file}", layer_id_map)
        for new, old in layer_id_map.items():
            check.integer(new, "layer_id_map key", minimum=0)
            check.integer(old, "layer_id_map value", minimum=0)
        return self._with(blocks=(*self._spec.blocks, BlocksParams(pattern, tuple(layer_id_map.items()))))

    def set_selection(self, selection: str = "first", activations: Mapping[str, Any] | None = None) -> PruneConfig:
        """Say which rows and columns stay where the model is narrower than the file.

        Args:
            selection: "first" keeps the first ones of each tensor; "importance" keeps the heads, FFN channels and
                embedding columns that carry most, the same ones in all tensors that share them.
            activations: for "importance", what `measure_activations` found on the large model: a channel then counts by
                what it brings to the layers that read it. None goes by the weights alone, which know much less.

        Returns:
            This config.

        Raises:
            ArgumentTypeError, ArgumentError: another selection, activations that are no dict of vectors, or activations
                with "first", which does not read them.
        """
        check.choice(selection, SELECTIONS, "selection")
        if activations is not None and selection == "first":
            raise ArgumentError('activations need the selection "importance"; "first" does not read them.')
        return self._with(selection=selection, activations=None if activations is None else checked(activations))

    def set_head_size(self, size: int | None) -> PruneConfig:
        """Say how wide one attention head of the file is, where neither its config.json nor the model says.

        Args:
            size: rows of the query matrix that one head owns; None asks the file's config.json, then the model.

        Returns:
            This config.
        """
        return self._with(head_size=None if size is None else check.positive(size, "size"))

    def spec(self) -> PruneSpec:
        """The plain values, checked against each other."""
        self._spec.check()
        return self._spec

    def _with(self, **changes: Any) -> PruneConfig:
        self._spec = PruneSpec(**{**vars(self._spec), **changes})
        return self


def rename_blocks(names: Iterable[str], blocks: Sequence[BlocksParams]) -> tuple[dict[str, str], list[str]]:
    """Renumber the blocks of a file.

    Args:
        names: tensor names of the file.
        blocks: the stacks; a name belongs to the first whose pattern it holds.

    Returns:
        New name -> name in the file, for all that stays; and the names of the dropped blocks.

    Raises:
        PatternError: a pattern matches no name, or its group is no number.
        ConfigError: a block is asked for that the file lacks, or two names become one.

    Example:
        >>> rename_blocks(["h.0.w", "h.1.w", "norm"], [BlocksParams(r"h.(\\d+).", ((0, 1),))])
        ({'h.0.w': 'h.1.w', 'norm': 'norm'}, ['h.0.w'])
    """
    names = list(names)
    compiled = [(bounded_regex(b.pattern), b) for b in blocks]
    found: list[set[int]] = [set() for _ in blocks]
    kept: dict[str, str] = {}
    dropped: list[str] = []
    for name in names:
        for seen, (expression, stack) in zip(found, compiled, strict=True):
            hit = expression.search(name)
            if hit is None:
                continue
            number = hit.group(1)
            if number is None or not (number.isascii() and number.isdigit()) or len(number) > 9:
                raise PatternError(
                    f"pattern {stack.pattern!r}: its first group must be a number. Received: {number!r} in {name!r}"
                )
            seen.add(int(number))
            new = [n for n, old in stack.layer_id_map if old == int(number)]
            renamed = [f"{name[: hit.start(1)]}{n}{name[hit.end(1) :]}" for n in new]
            if not new:
                dropped.append(name)
            break
        else:
            renamed = [name]
        for target in renamed:
            if target in kept:
                raise ConfigError(f"{kept[target]!r} and {name!r} of the file would both become {target!r}.")
            kept[target] = name
    for seen, stack in zip(found, blocks, strict=True):
        if not seen:
            raise PatternError(
                f"pattern {stack.pattern!r} matches none of the file's {len(names)} names, such as {names[:1]}."
            )
        lacking = sorted({old for _, old in stack.layer_id_map} - seen)
        if lacking:
            raise ConfigError(f"layer_id_map asks for block {lacking[0]} of the file, which holds {_ranges(seen)}.")
    return kept, dropped


def check_targets(targets: Iterable[str], blocks: Sequence[BlocksParams]) -> None:
    """Refuse a layer_id_map whose new numbers are not the model's own, where the pattern fits the model's names."""
    names = list(targets)
    for stack in blocks:
        expression = bounded_regex(stack.pattern)
        own = {int(hit.group(1)) for n in names if (hit := expression.search(n)) and hit.group(1).isdigit()}
        asked = {new for new, _ in stack.layer_id_map}
        if own and own != asked:
            raise ConfigError(
                f"layer_id_map must give each of the model's blocks a block of the file: the model has {_ranges(own)}. "
                f"Received: keys {sorted(asked)}"
            )


def _ranges(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    if found == list(range(found[0], found[-1] + 1)):
        return f"blocks {found[0]} to {found[-1]}"
    return f"blocks {', '.join(map(str, found))}"
