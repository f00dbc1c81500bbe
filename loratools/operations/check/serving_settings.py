"""Rules about serving programs: settings that they do not know, layers and tokens left out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loratools.operations.check.kohya_names import lost_modules
from loratools.operations.check.remedy import Remedy
from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.serving import WORDS, each_target, unusable
from loratools.operations.check.subject import Subject
from loratools.operations.check.targets import Target
from loratools_formats.contract.commands import FUSE_INSTEAD
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.disk.errors import printable
from loratools_formats.disk.files import inside
from loratools_formats.disk.strict_json import read_object

_MOST_TOKEN_BYTES = 4 << 20
_FOLDED = ("use_bdlora", "use_qalora")
"""Settings whose effect a plain LoRA can have."""
_HINTS = {"layer_replication": "Serve it with PEFT, which repeats the layers of the base"}
"""What to do about settings whose effect no plain LoRA of the base has."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _settings(subject: Subject, _: Adapter, target: Target) -> Iterator[Found]:
    """Find settings of the configuration that a program refuses or ignores."""
    if not subject.is_peft:
        return
    for key in target.refused_settings:
        value = subject.config.get(key)
        is_init = key == "init_lora_weights"
        taken = is_init and (not isinstance(value, str) or value.lower() in target.inits)
        if value and not taken:
            text = f"{target.label} refuses {key} = {printable(value, 60)}"
            remedy = Remedy("plain") if key in _FOLDED else None
            hint = _HINTS.get(key, "")
            yield Found(text, key, ADAPTER_CONFIG, remedy=remedy, target=target.name, hint=hint)
    for key in target.ignored_settings:
        if subject.config.get(key):
            text = f"{target.label} ignores {key}, so the adapter makes another change there"
            remedy = Remedy("plain") if key in _FOLDED else None
            hint = _HINTS.get(key, "")
            yield Found(text, key, ADAPTER_CONFIG, remedy=remedy, target=target.name, hint=hint)


def _gaps(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    """Find modules that some layers have and others do not."""
    layers: dict[str, set[str]] = {}
    for name in adapter.modules:
        number = _NUMBER.search(name)
        if number is not None:
            layers.setdefault(_NUMBER.sub("N", name), set()).add(number[0])
    every = set().union(*layers.values()) if layers else set()
    short = [name for name, own in layers.items() if own != every]
    what = "modules that only some layers have"
    yield from unusable(target, target.gaps, what, short, hint=FUSE_INSTEAD)


def _added_tokens(subject: Subject, _: Adapter, target: Target) -> Iterator[Found]:
    """Find tokens beside the adapter whose numbers the base does not have."""
    name = "added_tokens.json"
    words = WORDS[target.added_tokens]
    beside = any(entry.name == name for entry in subject.entries)
    if not words or subject.base is None or subject.folder is None or not beside:
        return
    size = subject.base.base.config.get("vocab_size")
    added = read_object(inside(subject.folder, name), _MOST_TOKEN_BYTES)
    new = [n for n in added.values() if isinstance(n, int) and isinstance(size, int) and n >= size]
    if new:
        text = f"{target.label} {words} added tokens, and {name} has {len(new)} beyond the base's"
        yield Found(text, name, name, target=target.name, hint=FUSE_INSTEAD)


RULES = (
    Rule(
        "LT514", "target-settings", "error",
        "The program refuses or ignores a setting of the configuration.",
        "Most programs that serve adapters know only the keys of a plain LoRA.",
        "Make it a plain LoRA: `loratools to-lora ADAPTER --energy 1 -o PLAIN`; if the "
        "initialisation changed the base: "
        "`loratools squeeze ADAPTER --initial INITIAL --energy 1 -o PLAIN`.",
        "targets.toml",
        each_target(_settings),
    ),
    Rule(
        "LT515", "target-gaps", "error",
        "Only some layers have a module, and the program needs it in all layers or in none.",
        "LoRAX stacks the factors of all layers; if one layer lacks them, it drops those of "
        "the others without an error.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "`LoraWeights.load` in LoRAX",
        each_target(_gaps),
    ),
    Rule(
        "LT516", "target-tokens", "error",
        "added_tokens.json has tokens that the base does not have (with `base`).",
        "The program refuses adapters that add tokens.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "`validate_new_adapter` in SGLang",
        each_target(_added_tokens),
    ),
    Rule(
        "LT518", "target-names", "error",
        "The program does not find modules by kohya's names of this architecture.",
        "diffusers converts some architectures and some of their modules. It does not load "
        "the others, and at most writes a warning to its log.",
        "Convert it: `loratools convert ADAPTER NEW --to diffusers`.",
        "the loaders of diffusers 0.42.1, run on every architecture that has a table of names",
        each_target(lost_modules),
    ),
)  # fmt: skip
