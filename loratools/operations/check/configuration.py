"""Rules about the configuration: what contradicts the tensors, and what else it says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.subject import Subject
from loratools_formats.core.file_names import ADAPTER_CONFIG

_LOCAL = re.compile(r"(?:[/~\\.]|[A-Za-z]:[\\/])")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_LEAST_SCALE, _LARGEST_SCALE = 1 / 4096, 64.0


def _local_base(subject: Subject) -> Iterator[Found]:
    name = subject.config.get("base_model_name_or_path")
    if not subject.is_peft or not isinstance(name, str) or not name:
        return
    if _LOCAL.match(name) or name.count("/") > 1 or not _HUB_ID.fullmatch(name):
        text = f"base_model_name_or_path is {name!r}, which is no id on the Hub"
        yield Found(text, "base_model_name_or_path", ADAPTER_CONFIG)


def _no_base(subject: Subject) -> Iterator[Found]:
    if subject.is_peft and subject.config and not subject.config.get("base_model_name_or_path"):
        yield Found("no base model is recorded", "base_model_name_or_path", ADAPTER_CONFIG)


def _unsorted(subject: Subject) -> Iterator[Found]:
    targets = subject.config.get("target_modules")
    if not subject.is_peft or not isinstance(targets, list):
        return
    names = [name for name in targets if isinstance(name, str)]
    if len(set(names)) < len(names):
        yield Found("target_modules names a module twice", "target_modules", ADAPTER_CONFIG)
    elif names != sorted(names):
        text = "target_modules is in no order: PEFT writes a set, and in another order each time"
        yield Found(text, "target_modules", ADAPTER_CONFIG)


def _alpha_not_positive(subject: Subject) -> Iterator[Found]:
    """Yield negative alphas as notes, since they are applied as they stand, and zeros as errors."""
    for finding in () if subject.adapter is None else subject.adapter.findings:
        if finding.code == "alpha-not-positive":
            severity = finding.severity if finding.severity == "note" else None
            yield Found(finding.message, finding.where, severity=severity)


def _extreme_scale(subject: Subject) -> Iterator[Found]:
    if subject.adapter is None:
        return
    for name, change in subject.adapter.modules.items():
        part = change.factors
        if part is not None and not _LEAST_SCALE <= abs(part.scale) <= _LARGEST_SCALE:
            if part.scale == 0.0:
                continue
            yield Found(f"{name} multiplies its factors by {part.scale:g}", name)
            return


RULES = (
    Rule(
        "LT201", "unknown-config-key", "warning",
        "The configuration sets a key that is not known.",
        "PEFT drops keys that its version does not know; if the key changes ΔW, the adapter "
        "makes another change there.",
        "Remove the key if it has no effect.",
        "`PeftConfigMixin.from_pretrained` in peft 0.21.2",
        of_readers=("unknown-config-key", "ignored-config-key"),
    ),
    Rule(
        "LT202", "unsupported-config-key", "warning",
        "The configuration sets a key that few programs support.",
        "Programs that serve adapters read r, lora_alpha and target_modules, and ignore "
        "other keys.",
        "Serve it with PEFT, and accept the finding in a baseline; remove the key if it has no "
        "effect.",
        "vllm/lora/peft_helper.py, 0.33.0",
        of_readers=("unsupported-config-key",),
    ),
    Rule(
        "LT203", "alpha-not-positive", "error",
        "An alpha is zero or negative. A negative one is only a note.",
        "With zero the module does nothing; llama.cpp takes 0 for “no alpha” and multiplies by 1. "
        "With a negative alpha, the product of the factors is subtracted.",
        "Correct it in adapter_config.json; if it is meant, accept the finding in a baseline.",
        "`get_scale` in src/llama-adapter.h",
        _alpha_not_positive, of_readers=("alpha-not-positive",), key="lora_alpha",
    ),
    Rule(
        "LT204", "changed-base", "warning",
        "The initialisation changed the base weights before training (PiSSA, OLoRA, CorDA, "
        "LoRA-GA, LoftQ).",
        "On the original base the adapter makes another change. Only PEFT changes the base "
        "again when it loads the adapter, and it does not do so exactly.",
        "Make it plain with the adapter saved before training: "
        "`loratools squeeze ADAPTER --initial INITIAL --energy 1 -o PLAIN`.",
        "peft 0.21.2, guide on LoRA initialisation",
        of_readers=("mutated-base",), key="init_lora_weights",
    ),
    Rule(
        "LT205", "config-missing", "warning",
        "The configuration that states the scale is missing.",
        "ΔW is known only up to a factor.",
        "Put adapter_config.json beside the weights.",
        "The reader of PEFT weights",
        of_readers=("config-missing",),
    ),
    Rule(
        "LT206", "activated-lora", "note",
        "The adapter acts only after certain tokens of the prompt.",
        "Programs that do not know aLoRA apply it to every token. vLLM 0.33 refuses it.",
        "Serve it with PEFT or llama.cpp, and accept the finding in a baseline.",
        "alora_invocation_tokens in peft 0.21.2 and in src/llama-adapter.cpp; "
        "vllm/lora/peft_helper.py, 0.33.0",
        of_readers=("activated-lora",),
    ),
    Rule(
        "LT207", "left-to-loader", "warning",
        "The file lacks tensors that PEFT computes from the base model.",
        "No other program does.",
        "Make it a plain LoRA: `loratools to-lora ADAPTER --base MODEL --rank R -o PLAIN`; "
        "Uni-LoRA also needs `--set order=NAME,NAME`.",
        "Uni-LoRA and FRoD in peft 0.21.2",
        of_readers=("left-to-loader",),
    ),
    Rule(
        "LT208", "latent-mapping-missing", "error",
        "The trained matrices of LoRA-XS or LoRA-SB are not in the file.",
        "The factors alone are a large part of the base weight.",
        "Save the adapter again with its lora_latent_mapping tensors.",
        "LoRA-XS, authors' code",
        of_readers=("latent-mapping-missing",),
    ),
    Rule(
        "LT209", "multihead-attention", "warning",
        "PEFT applies the change of an output projection twice.",
        "Programs that apply it once give another result than PEFT.",
        "Serve it with PEFT, and accept the finding in a baseline.",
        "peft.tuners.lora.layer.MultiheadAttention, 0.21.2",
        of_readers=("multihead-attention",),
    ),
    Rule(
        "LT210", "no-weight-change", "note",
        "This kind of adapter changes no weight.",
        "Rules about ΔW do not apply to it.",
        "Nothing; accept the finding in a baseline.",
        "Prompt tuning and prefix tuning in peft 0.21.2",
        of_readers=("no-weight-change",),
    ),
    Rule(
        "LT211", "local-base", "warning",
        "The base model is recorded as a path on somebody's machine.",
        "Nobody else can find it. vLLM's resolvers compare the text with the name of the "
        "model that they serve, and ignore the adapter.",
        "Write the id of the base on the Hub into adapter_config.json.",
        "vllm/plugins/lora_resolvers/filesystem_resolver.py, 0.33.0",
        _local_base,
    ),
    Rule(
        "LT212", "no-base-recorded", "warning",
        "No base model is recorded.",
        "PEFT cannot load the base by the adapter's name, and users do not know which model "
        "it is for.",
        "Write the id of the base on the Hub into adapter_config.json.",
        "`AutoPeftModel` in peft 0.21.2",
        _no_base,
    ),
    Rule(
        "LT213", "unsorted-targets", "note",
        "target_modules is not sorted, or names a module twice.",
        "Two runs of the same training then write different files.",
        "Sort the list in adapter_config.json.",
        "`LoraConfig` keeps a set, which older versions of PEFT wrote as it came",
        _unsorted,
    ),
    Rule(
        "LT214", "extreme-scale", "note",
        "A scale is above 64 or below 1/4096.",
        "Most often alpha or r was written by hand.",
        "Set r and lora_alpha to the values of the training; if they are right, accept the "
        "finding in a baseline.",
        "Bounds chosen here",
        _extreme_scale, statistical=True,
    ),
    Rule(
        "LT215", "target-without-tensors", "note",
        "target_modules names modules that the file does not hold.",
        "PEFT makes layers for them that do nothing.",
        "Remove the names from target_modules.",
        "`check_target_module_exists` in peft 0.21.2",
        of_readers=("target-without-tensors",),
    ),
    Rule(
        "LT216", "pattern-unmatched", "warning",
        "A rank or alpha pattern matches no module.",
        "The modules that it was meant for have another rank or scale than intended.",
        "Correct the pattern, or remove it.",
        "`get_pattern_key` in peft 0.21.2",
        of_readers=("pattern-unmatched",),
    ),
    Rule(
        "LT217", "targets-unclear", "note",
        "It cannot be determined whether target_modules names every module.",
        "The regular expression is malformed, too long or too slow.",
        "List the names of the modules.",
        "`check_target_module_exists` in peft 0.21.2",
        of_readers=("targets-unclear",),
    ),
    Rule(
        "LT218", "scale-assumed", "warning",
        "The file holds no scale, so 1 is assumed.",
        "Programs with another default apply the adapter more strongly or more weakly.",
        "Write it down: `loratools convert ADAPTER -o NEW --from safetensors --to peft`.",
        "The readers of files without a configuration",
        of_readers=("scale-assumed",),
    ),
)  # fmt: skip
