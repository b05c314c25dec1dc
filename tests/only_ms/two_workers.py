"""Run under msrun: the trainer's losses and configuration, as JSON per process."""

import json
import os
import sys
from pathlib import Path

import numpy as np

from slimkit_ms import Trainer

import mindspore as ms
from mindspore import nn


class Pairs:
    def __init__(self):
        rng = np.random.default_rng(3)
        self.x = rng.standard_normal((40, 5)).astype(np.float32)
        self.y = (self.x @ rng.standard_normal((5, 2))).astype(np.float32)

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def main(folder, batch_size):
    ms.set_device("CPU")
    if "MS_ROLE" in os.environ:  # the scheduler that msrun starts, too
        ms.communication.init()
    ms.set_context(mode=ms.GRAPH_MODE)
    net = nn.SequentialCell(nn.Dense(5, 4), nn.ReLU(), nn.Dense(4, 2))
    rng = np.random.default_rng(0)
    for p in net.get_parameters():
        p.set_data(ms.Tensor(rng.standard_normal(p.shape).astype(np.float32) * 0.3))
    trainer = Trainer(net, nn.MSELoss(), lambda p: nn.SGD(p, learning_rate=0.1))
    history = trainer.train(Pairs(), 2, eval_dataset=Pairs(), per_device_batch_size=batch_size)
    found = {
        "loss": history.get_metric_values("train_loss_step"),
        "eval": history.get_metric_values("eval_loss_epoch"),
        "config": {k: v for k, v in trainer.run_config.to_dict().items() if isinstance(v, (int, bool))},
    }
    rank, world, _ = trainer._processes()
    Path(folder, f"{world}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("GLOG_v", "3")
    main(sys.argv[1], int(sys.argv[2]))
