"""Where single files' changes go in GGUF models of diffusion programs.

ComfyUI-GGUF and stable-diffusion.cpp keep the names and shapes of the checkpoint that a model was
made from. Its tensors are placed on as those of a checkpoint are, therefore, and in llama.cpp's
models, whose layers are `blk.N`, they are not.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.plan import plan_fuse
from loratools.operations.fuse.terms import WeightedChange
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.containers.gguf.model import decoded
from loratools_formats.containers.gguf.splits import GgufModel
from loratools_formats.contract.registry import get_format
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import UnsupportedError

_OF_LLAMA_CPP = ("blk.", "token_embd.", "v.blk.", "enc.blk.", "dec.blk.")


def is_of_diffusion(base: GgufModel, inputs: Sequence[FuseInput]) -> bool:
    """Return whether single files are to be fused into a model with a checkpoint's own names."""
    single = all(get_format(item.adapter.format).naming is not None for item in inputs)
    return single and not any(name.startswith(_OF_LLAMA_CPP) for name in base.tensors)


def diffusion_changes(
    base: GgufModel, inputs: Sequence[FuseInput]
) -> tuple[dict[str, list[WeightedChange]], tuple[Finding, ...]]:
    """Return the changes of each tensor, and what to tell of them.

    Raises:
        AdapterError: a module fits no tensor, or not its shape.
        UnsupportedError: an adapter replaces what the base has, or its ΔW is not known.
    """
    tensors = {name: decoded(tensor) for name, tensor in base.tensors.items()}
    plan = plan_fuse(Checkpoint(base.path, tensors, {}, ()), inputs)
    for tensor in plan.touched:
        if tensor.replaced_by is not None or tensor.patches or tensor.key not in base.tensors:
            raise UnsupportedError(
                "values that replace the base's are not fused into a GGUF model",
                path=base.path,
                tensor=tensor.key,
                hint="Fuse into the checkpoint that the model was made from",
            )
    return {each.key: list(each.changes) for each in plan.touched}, plan.findings
