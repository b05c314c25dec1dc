"""The default path uses nothing that MindSpore has announced to take away: its own notices are read."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A line of MindSpore's log that takes something back: a module, an operator, an argument, a whole mode.
NOTICE = re.compile(r"^\[\w+\] ME\(.*?\] (.*(?:deprecat|be removed|no longer|retire).*)$", re.IGNORECASE | re.MULTILINE)

# What MindSpore's own Adam says of a part of itself, whoever makes one.
OWN = "'FusedSparseAdam' is deprecated"


def run(*arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOG_v": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_the_default_path_draws_no_notice(kit):
    said = run(str(ROOT / "tests" / "only_ms" / "default_path.py"))
    assert "done" in said, said[-3000:]
    notices = NOTICE.findall(said)
    assert [notice for notice in notices if OWN not in notice] == []
    assert notices  # so they are seen


ADAPTER = "matmul_down_sampler bias_down_sampler non_linearity matmul_up_sampler bias_up_sampler residual_add"
LOW_RANK = (
    "matmul_down_sampler_weight matmul_down_sampler_input bias_down_sampler non_linearity "
    "matmul_up_sampler_weight matmul_up_sampler_input bias_up_sampler residual_add"
)
# What users' code gives by name, whatever becomes of MindSpore's static-graph parallel.
SHARDS = {
    "LoRADense": "org_dense_matmul org_bias_add lora_dropout lora_a_matmul lora_b_matmul lora_mul lora_add activation",
    "AdapterLayer": ADAPTER,
    "AdapterDense": f"matmul_org bias_org activation_org {ADAPTER}",
    "LowRankAdapterLayer": LOW_RANK,
    "LowRankAdapterDense": f"matmul_org bias_org activation_org {LOW_RANK}",
}


@pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="session")
def test_layers_take_the_arguments_of_shard_that_they_always_took(kit):
    for name, words in SHARDS.items():
        taken = list(inspect.signature(getattr(kit.slim, name).shard).parameters)
        assert taken == ["self", *(f"strategy_{word}" for word in words.split())], name
