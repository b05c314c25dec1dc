"""The files of tests that take longest, dearest first: begun first, they leave no worker alone at the end."""

from __future__ import annotations

# Of a whole run with two workers, each more than a minute; the rest follows by number of tests.
LONGEST = (
    "both/test_jobs.py",
    "only_ms/test_prune_ms_mindcv.py",
    "only_ms/test_recipes_ms.py",
    "only_ms/test_distill_ms.py",
    "chain/test_cli_networks.py",
    "both/test_stages.py",
    "only_ms/test_prune_ms.py",
    "faults/test_run_faults.py",
    "both/test_train_values.py",
    "only_torch/test_prune_forms.py",
    "chain/test_docs.py",
    "only_torch/test_device.py",
    "only_torch/test_smollm_recipe.py",
    "chain/test_user_types.py",
)


def longest_first(files: list[str]) -> list[int]:
    """Where each test of a run belongs, as a list of places in `files`.

    Args:
        files: the file of each test, below tests/.

    Example:
        >>> longest_first(["core/a.py", "core/b.py", "core/b.py", "both/test_jobs.py"])
        [3, 1, 2, 0]
    """
    first = {file: at for at, file in enumerate(LONGEST)}
    count = {file: files.count(file) for file in dict.fromkeys(files)}
    return sorted(range(len(files)), key=lambda at: (first.get(files[at], len(first)), -count[files[at]], files[at]))
