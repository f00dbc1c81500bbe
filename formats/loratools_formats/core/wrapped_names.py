"""What training code leaves in the names of modules, and names without it.

`torch.compile`, FSDP and activation checkpointing put a module of their own around others, and a
state dict that is not cleaned up has their names in it. No module of a model has such a name.
Source: torch 2.13, `eval_frame.py`, `fully_sharded_data_parallel.py`, `checkpoint_wrapper.py`.
"""

from __future__ import annotations

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def unwrapped(name: str) -> str:
    """Return a module's or tensor's name without wrappers.

    >>> unwrapped("_orig_mod.model._checkpoint_wrapped_module.q.weight")
    'model.q.weight'
    """
    if WRAPPERS.isdisjoint(name.split(".")):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
