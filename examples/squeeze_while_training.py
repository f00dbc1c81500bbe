"""Train an adapter of the tiny Llama in a plain loop, its rank falling from 32 to 4.

    python examples/squeeze_while_training.py OUTPUT [--steps 60]

Needs torch, peft and transformers: pip install 'loratools[train]'
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratools.training import SqueezeSchedule, squeeze_model

HERE = Path(__file__).parent / "tiny-llama"
WINDOW, BATCH = 64, 4


def main() -> None:
    """Train, squeeze at each boundary, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    text = (HERE / "texts" / "kjv.txt").read_text(encoding="utf-8")[:40_000]
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    config = LoraConfig(r=32, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    schedule = SqueezeSchedule.geometric(32, 4, steps=arguments.steps)
    for step in range(1, schedule.total + 1):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rule = schedule.rule_after(step)
        if rule is not None:
            done = squeeze_model(model, rule=rule, optimizer=optimizer)
            print(
                f"step {step}: loss {loss.item():.3f}, rank {max(done.ranks.values())}, "
                f"relative error {done.relative_error:.3f}, {done.parameters} parameters"
            )
    print(f"step {schedule.total}: loss {loss.item():.3f}")
    model.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
