"""How a pruner comes to a plan: couple, share the budget, choose indices, rehearse, and again where code objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ArgumentError
from slimkit.core.log import logger
from slimkit.core.match import demand, match
from slimkit.core.prune.allocate import Account, Allocation, aligned_places, allocate
from slimkit.core.prune.attributes import config_changes, new_values, scope_sizes
from slimkit.core.prune.cache_size import CacheAccount
from slimkit.core.prune.criteria import CRITERIA, Criterion
from slimkit.core.prune.experts import fields_after, find_experts, numbers_after, stay_notes
from slimkit.core.prune.expressions import Index
from slimkit.core.prune.forms import CutForm, multiples_of, told_heads, vocabulary_notes
from slimkit.core.prune.framework import PruneFramework
from slimkit.core.prune.importance import best
from slimkit.core.prune.knapsack import foretold, measured
from slimkit.core.prune.latency import BAD_FIT, LatencyAccount, LatencyTable
from slimkit.core.prune.levers import Lever, counts_experts, inner_levers, joined_losses, joined_scores, lever_matrix
from slimkit.core.prune.narrowing import Narrowing, alike_levers
from slimkit.core.prune.plan import PrunePlan, make_desc
from slimkit.core.prune.reporting import allocated, padding
from slimkit.core.prune.settings import PrunerSettings
from slimkit.core.prune.solve import Coupling, View
from slimkit.core.prune.stream import Stream, find_stream, part

_ROUNDS = 200
_LEAST, _LEAST_MEASURED = 0.5, 0.1

Array = np.ndarray[Any, Any]


class PrunerPlanning(PrunerSettings):
    """The part of a pruner that makes plans; the model is untouched.

    Args:
        wing: the framework's side.
    """

    def __init__(self, wing: PruneFramework) -> None:
        super().__init__(wing)
        self._narrowing: Narrowing | None = None
        self._made: dict[str, Any] = {}  # what this plan's settings came to
        self._report: dict[str, Any] = {}
        self._cut_form: CutForm | None = None
        self._levers: list[Lever] = []
        self._stream: Stream | None = None  # what is turned before the cut
        self._parted: dict[str, str] = {}  # a matrix that gets values of its own -> the table it shared them with
        self._steps: dict[str, int] = {}
        self._floor = 1.0
        self._quiet = False  # whether a ratio that is missed is of no interest
        self._most: Mapping[str, int] = {}  # steps that levers may keep at most, where less than all

    @property
    def is_language_model(self) -> bool:
        """Whether the model has a table of embeddings and attention, so that only data tells what it can lose."""
        return self._solved().is_language_model

    def is_timed_by(self, table: LatencyTable) -> bool:
        """Whether a table tells this network's latency, at the size of the example."""
        return table.holds(self._solved().view([]))

    def _planned(self, ratio: float, whole: list[str], most: Mapping[str, int] | None = None) -> dict[str, Any]:
        """A plan, and the report that belongs to it.

        Args:
            ratio: share of the budget to keep.
            whole: layers whose outputs stay whole.
            most: lever -> steps that it may keep at most.
        """
        if self._rotate and self._narrowing is not None and self._stream is None:
            self._begin_anew()  # the last plan had nothing to turn
        desc = self._plan_made(ratio, whole, most)
        if self._parted and "rotated" not in desc["made"]:
            # A copy of the table would be held for nothing.
            self._begin_anew()
            self._rotate = False
            try:
                desc = self._plan_made(ratio, whole, most)
            finally:
                self._rotate = True
            self._report["notes"].append("the hidden width stays whole, so that nothing is turned")
        return desc

    def _plan_made(self, ratio: float, whole: list[str], most: Mapping[str, int] | None) -> dict[str, Any]:
        narrowing, form = self._begun(), self._form_begun()
        narrowing.begin()
        self._most = most or {}
        # Each round ties or pins something, or tries another of a few numbers; after many, the rest is not worth it.
        for rounds in count():
            view = narrowing.coupling.view(whole, self._scoring.suited(self.is_language_model) is CRITERIA["output"])
            allocation, account = self._allocate(view, ratio)
            if isinstance(account, LatencyAccount) and self._floor == 0:
                account.refuse_ruin(allocation, view.counts)
            desc = self._describe(view, allocation, ratio, whole)
            if not form.contradicts(view, PrunePlan(desc)) and self._rehearse(view, desc):
                break
            if rounds == _ROUNDS:
                narrowing.keep_everything(f"its code contradicted {rounds} plans")
        if form.name != "any":
            # What loading by the configuration will compute, the cut model holds as well.
            desc["derived"] = self._wing.derived(PrunePlan(desc).config)
            told_heads(self._wing, view, desc, form.held_at(view, allocation.keep))
        parameters, held = Account(view), form.held_at(view, allocation.keep)
        left = parameters.count(np.array([held[n] for n in view.counts], dtype=np.int64))
        copied = self._copied()
        self._report = allocated(
            view, allocation, account, left, ratio, self._budget, self._quiet, copied, desc["made"].get("allocation")
        )
        if "rotated" in desc["made"]:
            self._report["rotated"] = {**desc["made"]["rotated"], "added_params": copied}
            if copied:
                # The ratio is of the model before, so that a model which is mostly table pays dearly.
                note = f"a turned model holds its tied table twice: {copied:,} parameters more, which count"
                self._report["notes"].append(note)
                if not self._quiet:
                    logger.warning("%s; without rotation they are spared", note)
        self._report["notes"] += form.notes + vocabulary_notes(self._wing.config(), self._parallel)
        self._report["form"] = {"name": form.name, "because": form.because}
        if form.name == "padded":
            live = parameters.count(np.array([allocation.keep[n] for n in view.counts], dtype=np.int64))
            self._report["padding"] = padding(view, allocation.keep, held, live, left)
            desc["made"]["live_params"] = live
        if self._budget == "latency":
            full = account.count(np.array(list(view.counts.values()), dtype=np.int64))
            told = {"before_ms": full / 1e6, "after_ms": allocation.total / 1e6}
            desc["made"]["latency"] = told
            self._report["latency"] = told
            assert isinstance(account, LatencyAccount)
            if account.off_by > BAD_FIT:
                self._report["latency"] = {**told, "off_by": account.off_by}
                self._say(
                    f"the table foretells this network's time up to {account.off_by:.0%} wrong: measure it anew on a "
                    "quiet machine, and time what comes out"
                )
        desc["made"]["left_params"] = left
        desc["made"]["reached"] = self._report["reached"]
        if self._made["importance"] == "output":
            desc["made"]["foretold_loss"] = foretold(view.counts, allocation.keep, self._scoring.losses)
        return desc

    def _say(self, note: str) -> None:
        """Put a note into the report, and into the log."""
        self._report["notes"].append(note)
        if not self._quiet:
            logger.warning("%s", note)

    def _begun(self) -> Narrowing:
        if self._narrowing is None:
            with self._seconds.stage("trace"):
                self._narrowing = Narrowing(self._coupled())
        return self._narrowing

    def _coupled(self) -> Coupling:
        coupling = Coupling(self._wing.trace())
        if self._wing.one_head_size:
            coupling.keep_head_sizes()
        if self._rotate:
            coupling = self._stream_found(coupling)
        found = find_experts(coupling.graph, self._wing.config(), self._wing.configured)
        coupling.open_experts(e for e in found if not e.grouped)
        left = [path for path in self._wing.stacked() if path not in coupling.expert_dims]
        coupling.graph.notes += stay_notes(self._wing.framework, left, [e.module for e in found if e.grouped])
        return coupling

    def _stream_found(self, coupling: Coupling) -> Coupling:
        """Find the stream to turn; where its table is read behind a scale, the coupling with the two apart."""
        self._stream, self._parted = find_stream(coupling.view()), {}
        self._stream.check_read_by(coupling.graph)
        if not self._stream.tied:
            return coupling
        path = part(coupling.graph, self._stream.table)
        apart = Coupling(coupling.graph)
        if self._wing.one_head_size:
            apart.keep_head_sizes()
        self._stream = find_stream(apart.view())
        self._parted = {path: self._stream.table}
        return apart

    def _begin_anew(self) -> None:
        self._narrowing, self._report, self._cut_form, self._stream, self._parted = None, {}, None, None, {}
        self._scoring.anew()

    def _copied(self) -> int:
        """Parameters that a rotation adds."""
        shapes = self._solved().graph.shapes
        return sum(int(np.prod(shapes[path])) for path in self._parted)

    def _solved(self) -> Coupling:
        return self._begun().coupling

    def _wanted_whole(self, un_prune_list: Sequence[int | str] | None) -> list[str]:
        """The layers whose outputs stay whole; weights that were trained since the last look are noticed."""
        if un_prune_list is None:
            un_prune_list = [0, -1] if self._solved().graph.layers and self._form_begun().name == "any" else []
        whole = self._layers(un_prune_list)
        self._scoring.look(self._solved().graph.shapes)
        return whole

    def _layers(self, wanted: Sequence[int | str]) -> list[str]:
        layers = self._solved().graph.layers
        if isinstance(wanted, (str, bytes)) or not isinstance(wanted, (list, tuple)):
            check.wrong_type("un_prune_list", "a list of ints or names", wanted)
        out: list[str] = []
        for item in wanted:
            if isinstance(item, str):
                further = [*self._solved().graph.further, *self._solved().expert_dims]
                named = [*layers, *(p for p in further if p not in layers)]
                found = match(named, [item], whole_modules=True)
                demand(found, named, "un_prune_list")
                out.extend(found.names)
                continue
            if not layers:
                check.wrong_value("un_prune_list", "empty: no Conv or Linear layer ran in this model", item)
            check.integer(item, "un_prune_list", -len(layers), len(layers) - 1)
            out.append(layers[item])
        return out

    def _form_begun(self) -> CutForm:
        if self._cut_form is None or self._cut_form.wanted != self._form:
            self._cut_form = CutForm(self._form, self._wing, self._solved())
        return self._cut_form

    def _account(self, view: View) -> Account:
        """What the ratio counts."""
        if self._budget == "latency":
            assert self._table is not None
            if self._form_begun().name == "padded":
                raise ArgumentError(
                    'the budget "latency" needs the form "config" or "any": zeros that pad a width take time like any '
                    'other numbers. Received: the form "padded"'
                )
            return LatencyAccount(view, self._table)
        return CacheAccount(view) if self._budget == "kv_cache" else Account(view, self._budget)

    def _allocate(self, view: View, ratio: float) -> tuple[Allocation, Account]:
        account = self._account(view)
        full = np.array(list(view.counts.values()), dtype=np.int64)
        target = ratio * (account.count(full) - (self._copied() if self._budget == "params" else 0))
        criterion = self._scoring.suited(self.is_language_model)
        if self._rotate and criterion is not CRITERIA["output"]:
            raise ArgumentError(
                'set_rotation needs the importance "output" and calibration data, for only these tell the axes. '
                f"Received: the importance {criterion.name!r}"
            )
        allocation = self._allocation or ("measured" if criterion is CRITERIA["output"] else "uniform")
        if allocation == "measured" and criterion is not CRITERIA["output"]:
            raise ArgumentError(
                'allocation "measured" needs the importance "output" and calibration data, for only these foretell the '
                f"loss of a cut. Received: the importance {criterion.name!r}"
            )
        self._made = {"importance": criterion.name, "allocation": allocation}
        self._levers = self._form_begun().levers(view)
        multiples = multiples_of(view, self._levers, self._parallel, self._wing.row_steps())
        fixed: dict[str, int] = {}
        while True:
            # Levers that had to be put elsewhere stay there, and the others make up for it.
            free = [x for x in self._levers if x.name not in fixed]
            offsets, matrix = lever_matrix(account.names, view.counts, self._levers, fixed)
            musts = [multiples[x.name] for x in free]
            counted = [x.name for x in free if counts_experts(view, x)]
            joined = account.joined([x.name for x in free], offsets, matrix, musts, counted)
            sizes = [x.size // m * m for x, m in zip(free, musts)]
            found = self._turned(view, joined, free, sizes, target, criterion, allocation)
            if fixed:
                break
            steps = joined.steps(self._alignment, np.array(sizes, dtype=np.int64)).tolist()
            least = dict(zip(joined.names, steps))
            fixed = self._form_begun().settled(view, self._levers, found.keep, least, self._most)
            if not fixed:
                break
        self._steps = {**found.keep, **fixed}
        counts = offsets + matrix @ np.array([found.keep[n] for n in joined.names], dtype=np.int64)
        held = {v for x in self._levers if x.name in found.held_back for v in x.members}
        found.keep = dict(zip(account.names, counts.tolist()))
        found.held_back = [n for n in account.names if n in held]
        return found, account

    def _turned(
        self,
        view: View,
        account: Account,
        levers: list[Lever],
        sizes: list[int],
        target: float,
        criterion: Criterion,
        allocation: str,
    ) -> Allocation:
        """Where each lever is to stand, by the scores or losses of what it cuts."""
        least = _LEAST_MEASURED if allocation == "measured" else _LEAST
        self._made["node_reserved_ratio"] = self._node_ratio or least
        least = self._node_ratio or account.floor_for(sizes, least, self._alignment, target)
        self._floor = least  # 0: no floor that is left reaches the target
        limits, level = (target, least, self._alignment), self._begun().level
        labels = alike_levers(view, levers)
        most = [min(size, self._most.get(x.name, size)) for x, size in zip(levers, sizes)]
        if allocation == "measured":
            beside = aligned_places(account, self._form_begun().beside_whole(levers), sizes, self._alignment)
            inner = None if self._rotate else inner_levers(view, account, levers, sizes, limits, beside)
            wanted = view.variables
            if inner is None:
                beside = {}
            else:
                moved = {v for x in self._levers if x.name in inner or x not in levers for v in x.members}
                wanted = [v for v in wanted if v.name in moved]
            with self._seconds.stage("score"):
                self._scoring.score(view, criterion, wanted, self._stream)
            losses = joined_losses(levers, sizes, self._scoring.losses)
            return measured(account, sizes, *limits, losses, labels if level else None, most, beside)
        with self._seconds.stage("score"):
            scores = self._scoring.score(view, criterion, view.variables)
        chunks = None
        if allocation == "global":
            comparable = criterion.comparable
            chunks = {n: s if comparable else s / max(s.mean(), 1e-30) for n, s in scores.items()}
            chunks = {x.name: joined_scores(x, chunks)[x.size - size :] for x, size in zip(levers, sizes)}
        gives_way = self._node_ratio is None
        return allocate(account, sizes, *limits, chunks, labels, level=level, gives_way=gives_way, most=most)

    def _describe(self, view: View, allocation: Allocation, ratio: float, whole: list[str]) -> dict[str, Any]:
        form, scores = self._form_begun(), self._scoring.scores
        held = form.held_at(view, allocation.keep)
        keep: dict[str, Index] = {n: best(scores[n], k) for n, k in held.items()}
        padded = {n: np.setdiff1d(keep[n], best(scores[n], k)) for n, k in allocation.keep.items() if k < held[n]}
        integers, fields = self._wing.integers(), self._wing.config()
        sizes = scope_sizes(view, held) if integers or fields else {}
        candidates = {
            module: {name: new_values(name, old, sizes.get(module, {})) for name, old in numbers.items()}
            for module, numbers in integers.items()
        }
        narrowing = self._begun()
        chosen = narrowing.choose(candidates)
        attributes = {
            module: changed
            for module, numbers in integers.items()
            if (changed := {n: (old, new) for n, old in numbers.items() if (new := chosen[module][n]) != old})
        }
        experts = narrowing.coupling.experts
        kept = {v.layers[0]: allocation.keep[v.name] for v in view.variables if v.kind == "experts"}
        for module, changed in numbers_after(experts, kept, integers).items():
            attributes.setdefault(module, {}).update(changed)
        config = form.fields(view, self._levers, self._steps, allocation.keep)
        if config is None:
            config = config_changes(fields, view, held, sizes)
        config.update(fields_after(experts, kept, fields))
        turned = self._stream.variable(view) if self._stream else None
        is_turned = turned is not None and len(keep[turned]) < view.counts[turned]
        if self._parted and is_turned:
            config["tie_word_embeddings"] = (True, False)
        made = {
            "framework": self._wing.framework,
            "reserved_ratio": ratio,
            "budget": self._budget,
            **self._made,
            "form": form.name,
            "parallel": self._parallel,
            "alignment": self._alignment,
            "un_prune": whole,
            **({"rotated": {"apart": dict(self._parted)}} if is_turned else {}),
        }
        return make_desc(view, keep, attributes, config, made, padded)

    def _rehearse(self, view: View, desc: dict[str, Any]) -> bool:
        """Try the plan on the framework's side; where the model's code contradicts it, narrow what the next may do."""
        plan = PrunePlan(desc)
        if not plan.keep:
            return True
        found = self._wing.rehearse(plan, view)
        if found.contradiction is None:
            for module, changes in found.attributes.items():
                desc["attributes"].setdefault(module, {}).update({name: list(pair) for name, pair in changes.items()})
            return True

        def works(names: Collection[str]) -> bool:
            variables = {
                name: v if name in names else {**v, "keep": list(range(v["size"]))}
                for name, v in desc["variables"].items()
            }
            part = PrunePlan({**desc, "variables": variables})
            return self._wing.rehearse(part, view).contradiction is None

        self._begun().narrow(found.contradiction, view, view.counts | plan.counts, works)
        return False
