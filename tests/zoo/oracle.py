"""The zero-mask oracle: a pruned model must equal the unpruned one whose dropped indices were set to zero."""

from __future__ import annotations

import copy
import json

import numpy as np

from slimkit import surgery
from slimkit.core.batch import as_call
from slimkit.core.prune.plan import PrunePlan
from slimkit.prune import PruneTorch

import torch


def logits(output):
    while not isinstance(output, torch.Tensor):
        if hasattr(output, "logits"):
            output = output.logits
        else:
            output = next(iter(output.values() if hasattr(output, "values") else output))
    return output


def call(model, inputs):
    args, kwargs = as_call(inputs)
    return logits(model(*args, **kwargs))


def zeroed(model, desc):
    """A copy in which everything that the plan drops is zero."""
    twin = copy.deepcopy(model)
    plan = PrunePlan(desc)
    for path, axes in plan.indices.items():
        tensor = surgery.tensors(twin)[path]
        for axis, index in enumerate(axes):
            if index is not None:
                gone = np.setdiff1d(np.arange(tensor.shape[axis]), index)
                with torch.no_grad():
                    tensor.index_fill_(axis, torch.from_numpy(gone), 0.0)
    return twin


def pruner(model, inputs, ratio_floor=0.25, alignment=4):
    return PruneTorch(model, inputs).set_node_reserved_ratio(ratio_floor).set_alignment(alignment)


def check(model, inputs, ratio=0.6, hidden=False, alignment=4, atol=2e-4, un_prune=()):
    """Prune a copy and prove it; returns (pruned model, desc, report).

    `hidden` lets normalised features be pruned, after which the means of the norms differ by design, so that only
    shapes,
    finiteness and gradients are compared.
    """
    small = copy.deepcopy(model)
    # Cuts of any shape: what is proved is the coupling, whatever a configuration can say of it.
    job = pruner(small, inputs, alignment=alignment).set_form("any")
    if not hidden:
        for variable in job._solved().view().variables:
            if variable.kind == "hidden":
                path, axis, _ = variable.places[0]
                job._solved().pin(job._solved().relations.params[path][axis], "test")
    left, planned = job.analysis(ratio, list(un_prune))
    desc = job.prune(ratio, list(un_prune))
    assert desc == planned
    assert left == sum(p.numel() for p in small.parameters())
    assert left < sum(p.numel() for p in model.parameters()), "nothing was pruned"
    with torch.no_grad():
        got = call(small, inputs)
        if not hidden:
            want = call(zeroed(model, desc), inputs)
            assert got.shape == want.shape
            scale = max(1.0, float(want.abs().max()))
            np.testing.assert_allclose(got.numpy(), want.numpy(), atol=atol * scale, rtol=1e-4)
        assert torch.isfinite(got).all()
    again = copy.deepcopy(model)
    PruneTorch(again, inputs).prune_by_desc(json.loads(json.dumps(desc)))
    with torch.no_grad():
        assert torch.equal(call(again, inputs), got)
    small.train()
    call(small, inputs).square().mean().backward()
    grads = [p.grad for p in small.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)
    small.eval()
    return small, desc, job.report()
