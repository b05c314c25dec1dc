"""Run under torchrun: the trainer's losses, its configuration and a distillation under DDP, as JSON per process."""

import json
import os
import sys
from pathlib import Path

from slimkit import KnowledgeDistillConfig, Trainer, get_distill_model

import torch


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def main(folder, batch_size):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=generator)
    data = torch.utils.data.TensorDataset(x, x @ torch.randn(5, 2, generator=generator))
    loss = torch.nn.functional.mse_loss
    trainer = Trainer(build(), loss, lambda p: torch.optim.SGD(p, lr=0.05))
    history = trainer.train(data, 2, eval_dataset=data, per_device_batch_size=batch_size, gradient_accumulation_steps=2)
    config = KnowledgeDistillConfig().add_inter_soft_label(
        {
            "t_module": "0",
            "s_module": "0",
            "t_output_idx": 0,
            "s_output_idx": 0,
            "loss_func": [{"func_name": "HiddenMse", "func_weight": 1}],
        }
    )
    teacher = build()
    torch.manual_seed(5)
    student = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    dual = get_distill_model(teacher, student, config, x[:2])
    distilled = Trainer(dual, loss, lambda p: torch.optim.SGD(p, lr=0.05)).train(
        data, 1, per_device_batch_size=batch_size
    )
    rank = int(os.environ.get("RANK", "0"))
    found = {
        "loss": history.get_metric_values("train_loss_step"),
        "eval": history.get_metric_values("eval_loss_epoch"),
        "distilled": distilled.get_metric_values("train_loss_step"),
        "config": {k: v for k, v in trainer.run_config.to_dict().items() if isinstance(v, (int, bool))},
    }
    Path(folder, f"{os.environ.get('WORLD_SIZE', '1')}-{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
