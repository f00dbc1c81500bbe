"""Whether the options of a merge fit its method and its adapters."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.operations.merge.align import MergeInput
from loratools.operations.merge.methods import Method
from loratools.operations.merge.options import MergeOptions
from loratools_formats.disk.errors import OptionError


def check_fit(inputs: Sequence[MergeInput], options: MergeOptions, method: Method) -> None:
    """Refuse options that do not fit.

    Raises:
        OptionError: they do not fit the method, or the number of adapters.
        UnsupportedError: an adapter does not tell its ΔW.
    """
    count = len(inputs)
    if count < method.least or (method.most is not None and count > method.most):
        most = "" if method.most is None else f" and at most {method.most}"
        raise OptionError(
            f"method {method.name} has the wrong number of adapters",
            got=count,
            expected=f"at least {method.least}{most}",
        )
    if options.space == "core" and method.kind != "elementwise":
        raise OptionError(f"`space=core` is for elementwise methods; {method.name} is not one")
    if method.uncompressed and options.rule.is_given:
        raise OptionError(f"{method.name} keeps all ranks", hint="Use linear to choose ranks")
    has_dora = any(d.is_dora for item in inputs for d in item.adapter.modules.values())
    if has_dora or (method.kind == "elementwise" and options.space == "full"):
        for name in ("sv_cumulative", "threshold"):
            if getattr(options.rule, name):
                raise OptionError(
                    f"{name} needs all singular values, which are not computed for "
                    + ("a DoRA" if has_dora else f"method {method.name}"),
                    hint="Use `rank` or `energy`",
                )
    for item in inputs:
        item.adapter.require_true_delta("merge")
    for override in options.overrides:
        method.checked(override.parameters)
        if override.weights is not None and len(override.weights) not in (1, count):
            raise OptionError(
                f"wrong number of weights for modules matching {override.match}",
                got=len(override.weights),
                expected=f"1 or {count}",
            )
