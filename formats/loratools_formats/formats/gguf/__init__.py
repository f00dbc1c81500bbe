"""GGUF: LoRA adapters for llama.cpp, and the container that its models come in.

`container` reads headers, `splits` puts the parts of a model together, `ggml_types` decodes values,
`architectures` is the table of layouts, `base` finds a base model's facts, `read` and `write` are
the two halves of the format, `from_model` and `to_model` lead from the base model's names to the
file's and back, and `model` is for models that are to be changed.
"""

from __future__ import annotations

from loratools_formats.contract.plugins import deferred
from loratools_formats.contract.registry import Format
from loratools_formats.core.alora import INVOCATION_TOKENS

FORMAT = Format(
    name="gguf",
    description="GGUF adapter file for llama.cpp",
    suffixes=(".gguf",),
    is_folder=False,
    sniff=deferred("loratools_formats.containers.gguf.container", "is_gguf"),
    read=deferred(f"{__name__}.read", "read"),
    losses=deferred(f"{__name__}.write", "losses"),
    write=deferred(f"{__name__}.write", "write"),
    weights_nbytes=deferred(f"{__name__}.write", "weights_nbytes"),
    merged_config=deferred(f"{__name__}.write", "merged_config"),
    to_model=deferred(f"{__name__}.to_model", "to_model"),
    from_model=deferred(f"{__name__}.from_model", "from_model"),
    dtypes=("f32", "f16", "bf16", "q8_0"),
    caveats_kept=(INVOCATION_TOKENS,),
)
