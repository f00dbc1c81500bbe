"""Make the `tiny-llama` fixtures: a small base model and three adapters for it.

The base is a Llama of 1.3 million parameters trained from scratch on the
docstrings and the language reference that come with the running Python. Each
adapter then learns another kind of text, kept in `texts/` below the output.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import fixture_common
import tiny_llama_texts
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SEED = 20240917
BASE_NAME = "loratools/tiny-llama"
VOCABULARY = 2048
WINDOW = 128
BATCH = 32
BASE_STEPS = 500
ADAPTER_STEPS = 120
QUICK_STEPS = 3
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Adapter:
    """One adapter: its text, its rate and the options given to PEFT."""

    name: str
    text: str
    about: str
    options: dict[str, object] = field(default_factory=dict)
    rate: float = 2e-3


ADAPTERS = [
    Adapter(
        "lora",
        "kjv.txt",
        "Proverbs and Ecclesiastes in the King James version",
        {"r": 32, "lora_alpha": 64},
    ),
    Adapter(
        "rslora",
        "python-code.txt",
        "source code of Python's standard library",
        {
            "r": 16,
            "lora_alpha": 16,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 32, r"layers\.[01]\.self_attn\.o_proj": 8},
            "alpha_pattern": {"q_proj": 32, "layers.3.self_attn.v_proj": 8},
        },
        rate=1e-3,
    ),
    Adapter(
        "dora",
        "us-founding.txt",
        "the Constitution and the Declaration of Independence of the United States",
        {"r": 16, "lora_alpha": 32, "use_dora": True},
    ),
]

CARD = """---
base_model: {base}
library_name: peft
tags:
- lora
- text-generation
---

# tiny-llama {name}

A fixture adapter for the tiny model beside it, trained on {about}.
Made by `examples/make_tiny_llama.py`; too small for any practical use.
"""


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it beside the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=2 * WINDOW,
    )
    fast.save_pretrained(str(out))
    with (out / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    return AutoTokenizer.from_pretrained(str(out))


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Encode the texts, join them and cut the stream into windows."""
    stream: list[int] = []
    for text in texts:
        stream += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        stream.append(tokenizer.eos_token_id)
    count = len(stream) // WINDOW
    return torch.tensor(stream[: count * WINDOW]).view(count, WINDOW)


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: torch.Tensor, steps: int) -> float:
    """Return the mean loss per token over all windows, or over a few after a few steps."""
    model.eval()
    data = data if steps > QUICK_STEPS else data[:BATCH]
    total = sum(
        model(input_ids=part, labels=part).loss.item() * len(part) for part in data.split(BATCH)
    )
    return total / len(data)


def train(model: torch.nn.Module, data: torch.Tensor, steps: int, rate: float) -> None:
    """Train with AdamW, a short warm-up and a cosine-shaped rate."""
    model.train()
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.95), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    started = time.monotonic()
    for step in range(steps):
        batch = data[torch.randint(len(data), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"  step {step}: train loss {loss.item():.4f} ({seconds:.0f} s)", flush=True)


def make_base(out: Path, steps: int) -> None:
    """Train the base model and its tokenizer, and save both."""
    fixture_common.fresh_directory(out)
    texts = tiny_llama_texts.documentation(SEED, docstrings=steps > QUICK_STEPS)
    cut = len(texts) * 98 // 100
    tokenizer = train_tokenizer(texts[:cut], out)
    data, held_out = windows(tokenizer, texts[:cut]), windows(tokenizer, texts[cut:])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    print(f"base: {model.num_parameters()} parameters, {data.numel()} tokens of text")
    print(f"  before: held-out loss {evaluate(model, held_out, steps):.4f}")
    train(model, data, steps, 3e-3)
    print(f"  after:  held-out loss {evaluate(model, held_out, steps):.4f}")
    model.to(torch.bfloat16).save_pretrained(str(out))


def load_base(path: Path) -> torch.nn.Module:
    """Load the saved base in fp32."""
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)


def make_adapter(adapter: Adapter, out: Path, steps: int) -> None:
    """Train one adapter, save it and compare the losses after loading it again."""
    tokenizer = AutoTokenizer.from_pretrained(str(out / "model"))
    text = (out / "texts" / adapter.text).read_text(encoding="utf-8")
    data, held_out = (windows(tokenizer, [part]) for part in tiny_llama_texts.split_text(text))
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, target_modules=LINEARS, lora_dropout=0.05, **adapter.options
    )
    torch.manual_seed(SEED)
    base = load_base(out / "model")
    print(f"{adapter.name}: {data.numel()} tokens of text, {held_out.numel()} held out")
    print(f"  base:     held-out loss {evaluate(base, held_out, steps):.4f}")
    model = get_peft_model(base, config)
    train(model, data, steps, adapter.rate)
    print(f"  adapted:  held-out loss {evaluate(model, held_out, steps):.4f}")
    card = CARD.format(base=BASE_NAME, name=adapter.name, about=adapter.about)
    fixture_common.save_adapter(model, out / adapter.name, BASE_NAME, card)
    again = PeftModel.from_pretrained(load_base(out / "model"), str(out / adapter.name))
    print(f"  reloaded: held-out loss {evaluate(again, held_out, steps):.4f}")


def main() -> None:
    """Make the text that is missing, the base model and the adapters."""
    here = Path(__file__).parent / "tiny-llama"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--only-adapters", action="store_true", help="keep the base model")
    parser.add_argument("--quick", action="store_true", help="train a few steps only")
    arguments = parser.parse_args()
    out: Path = arguments.out
    base_steps, adapter_steps = BASE_STEPS, ADAPTER_STEPS
    if arguments.quick:
        base_steps = adapter_steps = QUICK_STEPS
    fixture_common.make_deterministic(SEED, 1 if arguments.quick else fixture_common.THREADS)
    if out.resolve() != here.resolve():
        shutil.copytree(here / "texts", out / "texts", dirs_exist_ok=True)
    code = out / "texts" / "python-code.txt"
    if not code.exists():
        code.write_text(tiny_llama_texts.library_code(), encoding="utf-8")
    if not arguments.only_adapters:
        make_base(out / "model", base_steps)
    for adapter in ADAPTERS:
        make_adapter(adapter, out, adapter_steps)


if __name__ == "__main__":
    main()
