"""What `spectrum` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratools.work.declared import option
from loratools.work.spellings import key_value
from loratools.work.typed import check_options


@dataclass(frozen=True)
class SpectrumOptions:
    """What to measure besides the spectra.

    Attributes:
        set_: a value that the change depends on, and that neither the file nor the base's
            config.json holds.
        entries: also stream every entry of ΔW, for the kurtosis of each module.
        against: score every module by z-score among the adapters in this folder.
    """

    set_: tuple[tuple[str, str], ...] = option(
        (), heading="Input", metavar="KEY=VALUE", parse=key_value
    )
    entries: bool = option(False, heading="Method")
    against: Path | None = option(None, heading="Input", metavar="FOLDER", reference="shelf")

    def __post_init__(self) -> None:
        check_options(self)
