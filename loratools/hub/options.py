"""What publishing can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loratools.work.declared import option
from loratools.work.typed import check_options
from loratools_formats.disk.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How to publish.

    Attributes:
        create: make the repository if there is none.
        private: make the repository private if there is none.
        branch: commit to this branch, which is made if there is none.
        create_pr: open a pull request instead of committing.
        message: title of the commit.
        base_model: name of the base model on the Hub, if the adapter does not record it.
        card: take the card's text from this file instead of the repository or the folder.
        no_card: publish no card, and leave the repository's as it is.
        no_check: publish without running `check` first.
        fail_on: publish nothing, and fail (exit code 1), for findings of this severity or worse;
            error by default.

    Raises:
        OptionError: options that contradict each other.
    """

    create: bool = option(False, heading="Output")
    private: bool = option(False, heading="Output")
    branch: str | None = option(None, heading="Output", metavar="NAME")
    create_pr: bool = option(False, heading="Output")
    message: str | None = option(None, heading="Output")
    base_model: str | None = option(None, heading="Input", metavar="USER/NAME")
    card: Path | None = option(None, heading="Input", metavar="FILE")
    no_card: bool = option(False, heading="Output")
    no_check: bool = option(False, heading="Method")
    fail_on: Literal["error", "warning", "note", "never"] | None = option(None, heading="Report")

    def __post_init__(self) -> None:
        check_options(self)
        if self.create_pr and self.branch is not None:
            raise OptionError("a pull request goes to the main branch, and `branch` is given")
        if self.card is not None and self.no_card:
            raise OptionError("`card` and `no_card` contradict each other")
