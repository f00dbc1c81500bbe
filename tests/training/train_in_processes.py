"""Train a small model under the Trainer, and keep its factors after each squeeze.

    torchrun --nproc-per-node 2 tests/training/train_in_processes.py OUTPUT SCHEDULE
    python tests/training/train_in_processes.py OUTPUT SCHEDULE

Every step is of the same samples, however many processes share them.
"""

import os
import sys
from pathlib import Path

import torch
from test_callback import SCHEDULES, STEPS, trainer
from transformers import TrainerCallback

from loratools.training import SqueezeCallback


class Keep(TrainerCallback):
    """Keeps the factors of this process, and what its optimizer knows of them, after each step."""

    def __init__(self):
        self.kept = {}

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):  # noqa: ARG002
        factors = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        known = {
            n: optimizer.state[p]["exp_avg"].clone()
            for n, p in model.named_parameters()
            if "lora_" in n
        }
        self.kept[state.global_step] = factors, known


def train(folder, schedule, processes=1):
    """Return the factors and momentum after each step, by number of step and by name."""
    keep = Keep()
    made = trainer(
        folder, SqueezeCallback(SCHEDULES[schedule]), config={"lora_dropout": 0.0}, more=[keep],
        per_device_train_batch_size=4 // processes, save_steps=STEPS // 2,
    )  # fmt: skip
    made.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")) or None)
    return keep.kept


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, schedule = Path(sys.argv[1]), sys.argv[2]
    kept = train(out / "trained", schedule, int(os.environ["WORLD_SIZE"]))
    torch.save(kept, out / f"process-{os.environ['RANK']}.pt")
