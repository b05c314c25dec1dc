"""Run by test_shared_commands.py, alone or under torchrun: commands that train, a part of the model in each process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

from slimkit.cli import main
from slimkit.core.jobs.interrupt import SaveOnInterrupt
from slimkit.train_state import Parcel

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
HOW = "--max-length 16 --epochs 2 --batch-size 8 --learning-rate 0.002 --save-every 1 --json"


def commands(folder):
    """Name -> arguments."""
    data, distill = f"--data {folder}/plain.jsonl {HOW}", f"distill --model {folder}/llama --layers 2"
    return {
        "cached": f"{distill} {data}",
        "online": f"{distill} {data} --teacher online --hidden-weight 1.0",
        "train": f"train --model {folder}/sparse {data} --eval {folder}/plain.jsonl",
        "adapt": f"adapt --model {folder}/llama {data} --rank 2 --merge --format peft",
        "factory": f"train --factory {folder}/nets.py:wide --data {folder}/x.npz --batch-size 8 --epochs 2 --json",
    }


def command(*arguments):
    """One command line, in this process."""
    before, sys.argv = sys.argv, ["slimkit", *arguments]
    try:
        main()
    except SystemExit as error:
        if error.code:
            raise AssertionError(f"{arguments} ended with {error.code}") from error
    finally:
        sys.argv = before


def run(folder, name):
    """One command; what it says to programs."""
    out, said = folder / f"{name}_{WORLD}", io.StringIO()
    with contextlib.redirect_stdout(said):
        command(*commands(folder)[name].split(), "--out", str(out))
    text = said.getvalue()
    assert bool(text) == (RANK == 0)  # one of them speaks
    if text:
        (folder / f"{name}_{WORLD}.json").write_text(json.dumps(json.loads(text)))


def dies(folder, name, who, step=2):
    """The same, and a process is killed: the last after an update that is saved, the first in the middle of saving."""
    after, each, saved = SaveOnInterrupt.on_step_end, Parcel._each, []

    def on_step_end(self, trainer):
        after(self, trainer)
        if who == "last" and trainer.global_step == step and RANK == WORLD - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def half(self, writes):
        saved.append(self)
        for number, found in enumerate(each(self, writes)):
            if who == "first" and RANK == 0 and len(saved) == step + 1 and number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield found

    SaveOnInterrupt.on_step_end, Parcel._each = on_step_end, half
    run(folder, name)


if __name__ == "__main__":
    where, *names = sys.argv[1:]
    if names[0] == "dies":
        dies(Path(where), *names[1:])
    for each in names if names[0] != "dies" else ():
        run(Path(where), each)
