"""Activated LoRA (arXiv 2504.12397): adapters that act only after certain tokens of the prompt.

The factors do not determine the change of a weight, since there is none before those tokens, so
operations on ΔW refuse such adapters. Formats that can say which tokens keep them.
"""

from __future__ import annotations

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError

INVOCATION_TOKENS = "alora_invocation_tokens"
"""Key of an adapter's configuration, in PEFT's and as GGUF adapters are handed to others."""

ACTIVATED = Finding(
    "activated-lora",
    "error",
    INVOCATION_TOKENS,
    "it acts only after the invocation tokens (activated LoRA)",
    "Only converting it between peft and gguf is supported yet",
)

_MAX_TOKEN = 1 << 32


def invocation_tokens(adapter: Adapter) -> list[int] | None:
    """Return the tokens after which an adapter acts, None if it always does.

    Raises:
        AdapterError: they are no tokens, or the adapter does not say which they are.
    """
    tokens = adapter.config.get(INVOCATION_TOKENS)
    is_activated = any(caveat.code == ACTIVATED.code for caveat in adapter.caveats)
    if not tokens and not is_activated:
        return None
    if (
        not isinstance(tokens, list)
        or not tokens
        or not all(type(token) is int and 0 <= token < _MAX_TOKEN for token in tokens)
    ):
        raise AdapterError(
            f"config value {INVOCATION_TOKENS} is wrong",
            path=adapter.source,
            got=tokens,
            expected="a list of token numbers",
        )
    return tokens
