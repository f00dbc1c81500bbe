"""`adapter_config.json`: strict validation, and the scale of each module.

Source: `LoraConfig` and `get_pattern_key` of peft 0.21.2. PEFT itself drops unknown keys with a
warning and accepts r = -4; here every key is either understood to leave ΔW alone, or handled, or
becomes a caveat which makes operations on ΔW refuse the adapter by that key's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools_formats.core.alora import ACTIVATED, INVOCATION_TOKENS
from loratools_formats.core.factors import scale_of
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import B_LAYOUT, FUSED_EXPERTS
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile
from loratools_formats.disk.strict_json import read_object
from loratools_formats.formats.peft.patterns import match_patterns

_MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 1 << 31

_LORA_GA = "LORAGA"
"""What the authors' fork calls LoRA-GA: a LoRA whose initialisation changes the base."""

_OF_LORA_GA = ("bsz", "direction", "dtype", "iters", "max_length", "scale", "stable_gamma")

MIDDLE_INITS = frozenset({"n_lora", "s_lora"})
"""Initialisations of NLoRA, which puts a matrix between the factors and leaves the base alone."""

_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"}) | MIDDLE_INITS
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

_NEUTRAL_KEYS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
        "monteclora_config", "mora_type", "nola_num_basis", "peft_type", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",
    }
)  # fmt: skip
OF_TRAINERS = frozenset(
    {
        # Unsloth's arguments of `get_peft_model`
        "max_seq_length", "qat_scheme", "random_state", "temporary_location", "unsloth_version",
        "use_gradient_checkpointing",
        # ms-swift, and LoRA+ in it and in LLaMA-Factory: types and learning rates of training
        "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "loraplus_lr_embedding",
        "loraplus_lr_ratio", "loraplus_weight_decay", "swift_type",
        # axolotl, of how training rounded; arguments of peft's functions that some write along
        "autocast_adapter_dtype", "low_cpu_mem_usage", "nvfp4_merge_aware",
        # peft 0.2: what `eval()` did to a model in memory
        "merge_weights",
    }
)  # fmt: skip
"""Keys that trainers write into PEFT's configuration, and that change nothing in the file."""

_HANDLED_KEYS = frozenset(
    {
        "alpha_pattern", "init_lora_weights", B_LAYOUT, "lora_alpha", "lora_bias",
        "modules_to_save", "r", "rank_pattern", "target_modules", "target_parameters",
        "trainable_token_indices", FUSED_EXPERTS, "use_dora", "use_rslora",
    }
)  # fmt: skip
VARIANT_KEYS = ("use_bdlora", "use_qalora", "kasa_config")
"""Keys of variants whose factors are no plain ones; see `variants`."""

NOT_A_PRODUCT = {
    "use_mora": "its square matrices act on a compressed input (MoRA)",
    "use_nola": "its factors are sums of random matrices that are not in the file (NOLA)",
}
"""Keys of systems that write a LoRA configuration and other tensors, and what they are."""

_REFUSED_KEYS = NOT_A_PRODUCT | {
    "arrow_config": "it is routed per token (Arrow)",
    "layer_replication": "its layers are numbered unlike the base model's",
    "megatron_config": "its factors are tensor-parallel shards",
}


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_rank(value: Any) -> bool:
    return _is_int(value) and 0 < value < _MAX_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_layers(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return value is None or all(type(each) is int for each in listed)


def _is_map(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(is_value(v) for v in value.values())


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(v) and v >= 0 for v in value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_alpha, "a finite number"),
    "rank_pattern": (lambda v: v is None or _is_map(_is_rank)(v), "a map from names to ranks"),
    "alpha_pattern": (lambda v: v is None or _is_map(_is_alpha)(v), "a map from names to numbers"),
    "target_modules": (
        lambda v: v is None or isinstance(v, str) or _is_strings(v),
        "a string or a list of strings",
    ),
    "exclude_modules": (
        lambda v: v is None or isinstance(v, str) or _is_strings(v),
        "a string or a list of strings",
    ),
    "layers_to_transform": (_is_layers, "a whole number or a list of them"),
    "target_parameters": (lambda v: v is None or _is_strings(v), "a list of strings"),
    "modules_to_save": (lambda v: v is None or _is_strings(v), "a list of strings"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (lambda v: v is None or isinstance(v, bool | str), "a boolean or a name"),
    "base_model_name_or_path": (lambda v: v is None or isinstance(v, str), "a string"),
    "peft_version": (lambda v: v is None or isinstance(v, str), "a string"),
    "trainable_token_indices": (
        lambda v: v is None or _is_rows(v) or _is_map(_is_rows)(v),
        "a list of row numbers, or a map from layer names to such lists",
    ),
} | {
    key: (lambda v: v is None or isinstance(v, bool), "true or false")
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora")
}


def check_value(values: Mapping[str, Any], key: str, path: Path | None = None) -> None:
    """Check one value of a configuration, if it is there.

    Raises:
        AdapterError: it has the wrong type or is out of range.
    """
    is_valid, expected = _RULES[key]
    if key in values and not is_valid(values[key]):
        raise AdapterError(
            f"config value {key} is wrong",
            path=path,
            got=json.dumps(values[key], default=str),
            expected=expected,
        )


_OF_ALL_KINDS = (
    "base_model_name_or_path", "exclude_modules", "layers_to_transform", "modules_to_save",
    "peft_version", "target_modules",
)  # fmt: skip


def check_of_all_kinds(values: Mapping[str, Any], path: Path) -> None:
    """Check the values that mean the same in every kind of adapter.

    Raises:
        AdapterError: one has the wrong type.
    """
    for key in _OF_ALL_KINDS:
        check_value(values, key, path)


class PeftConfig:
    """A validated configuration.

    Args:
        values: the parsed JSON object.
        path: where it came from, for messages.

    Raises:
        AdapterError: a value has the wrong type or is out of range.
    """

    def __init__(self, values: Mapping[str, Any], path: Path | None = None) -> None:
        self.values = values
        self.path = path
        for required in ("r", "lora_alpha"):
            if required not in values:
                raise AdapterError(f"config lacks {required}", path=path)
        for key in _RULES:
            check_value(values, key, path)

    @property
    def use_dora(self) -> bool:
        """Whether modules carry DoRA magnitudes."""
        return bool(self.values.get("use_dora"))

    @property
    def _alpha_pattern(self) -> Mapping[str, float]:
        return self.values.get("alpha_pattern") or {}

    def alpha_and_rank(self, names: list[str]) -> dict[str, tuple[float, int]]:
        r"""Resolve (lora_alpha, r) for each module or parameter path, as PEFT does.

        The first pattern, in file order, that `(.*\.)?(pattern)$` matches wins; the two
        patterns are independent of each other.

        Raises:
            AdapterError: a pattern is no regular expression, or takes too long to match.
        """
        ranks = match_patterns(self.values.get("rank_pattern") or {}, names, self.path)
        alphas = match_patterns(self._alpha_pattern, names, self.path)
        r, alpha = self.values["r"], self.values["lora_alpha"]
        return {name: (alphas.get(name, alpha), ranks.get(name, r)) for name in names}

    def scale(self, alpha: float, rank: int) -> float:
        """Return the factor of b @ a that PEFT makes of an alpha and a rank."""
        return scale_of(alpha, rank, is_rooted=bool(self.values.get("use_rslora")))

    def _odd_alphas(self) -> Iterator[Finding]:
        """Yield what is odd about alphas that PEFT takes as they stand: α/r may be 0 or below."""
        alphas = {f"alpha_pattern of {name}": alpha for name, alpha in self._alpha_pattern.items()}
        for name, alpha in {"lora_alpha": self.values["lora_alpha"], **alphas}.items():
            if alpha == 0:
                text, hint = "its modules do nothing", "Correct it if that is not meant"
                yield Finding("alpha-not-positive", "warning", name, f"{name} is 0: {text}", hint)
            elif alpha < 0:
                text = f"{name} is {alpha}: the factors' product is subtracted"
                yield Finding("alpha-not-positive", "note", name, text)

    def caveats(self) -> tuple[Finding, ...]:
        """List why the factors do not tell the true ΔW, if they do not, and what is odd."""
        found: list[Finding] = []
        init = self.values.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
            found.append(
                Finding(
                    "mutated-base",
                    "error",
                    "init_lora_weights",
                    f"init_lora_weights {init!r} changed the base weights before training",
                    "Make it plain with the adapter saved right after initialisation, which "
                    "squeeze takes as `initial`: "
                    "loratools squeeze ADAPTER --initial INITIAL --energy 1 -o PLAIN",
                )
            )
        elif isinstance(init, str) and init.lower() not in _PLAIN_INITS:
            found.append(unknown_key("init_lora_weights", init))
        if is_set(self.values.get(INVOCATION_TOKENS)):
            message = f"config key {INVOCATION_TOKENS}: {ACTIVATED.message}"
            found.append(replace(ACTIVATED, message=message))
        for key, reason in _REFUSED_KEYS.items():
            if is_set(self.values.get(key)):
                found.append(
                    Finding(
                        "unsupported-config-key",
                        "error",
                        key,
                        f"config key {key}: {reason}",
                        "This kind is not supported yet",
                    )
                )
        found += self._odd_alphas()
        known = (
            _NEUTRAL_KEYS
            | _HANDLED_KEYS
            | {INVOCATION_TOKENS}
            | set(_REFUSED_KEYS)
            | set(VARIANT_KEYS)
            | OF_TRAINERS
            | {B_LAYOUT, FUSED_EXPERTS}
        )
        found += [
            unknown_key(key, value)
            for key, value in sorted(self.values.items())
            if key not in known and is_set(value)
        ]
        return tuple(found)


def is_set(value: Any) -> bool:
    """Return whether a configuration value says anything."""
    return value is not None and value is not False and value not in ({}, [], "")


def unknown_key(key: str, value: Any) -> Finding:
    """Return the finding about a key that is not known."""
    return Finding(
        "unknown-config-key",
        "error",
        key,
        f"config key {key} = {value!r} is not known and may change the weights",
        f"If it has no effect on them, pass `ignore_key={key}`",
    )


def read_values(file: RegularFile) -> dict[str, Any]:
    """Read a configuration file, of any kind of adapter; that of LoRA-GA's fork as upstream's.

    Raises:
        AdapterError: not strict JSON, not an object, over 1 MiB, or without a kind.
    """
    values = read_object(file, _MAX_CONFIG_BYTES)
    kind = values.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterError("config has no peft_type", path=file.path, got=kind, expected="LORA")
    if kind == _LORA_GA:
        kept = {key: value for key, value in values.items() if key not in _OF_LORA_GA}
        return {**kept, "peft_type": "LORA"}
    return values
