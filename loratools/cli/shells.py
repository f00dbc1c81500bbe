"""What shells are told beside Click's own scripts: values after `--flag=`, and whole descriptions.

After `--flag=`, Click replaces the flag by the value in Zsh, offers nothing in Fish, and nothing in
Bash once a letter of the value is typed. In Fish it cuts a description at its first comma.
"""

from __future__ import annotations

from typing import Any

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)


class Bash(BashComplete):
    """Bash, for which `=` stands between two words and is one itself."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is typed, and that one."""
        words, incomplete = super().get_completion_args()
        return words[:-1] if words[-1:] == ["="] else words, incomplete


class _WholeWord(ShellComplete):
    """A shell for which a flag, `=` and the value are one word."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[Any]]:
        """Return what may follow, each with the flag that stands before it in the word."""
        found = super().get_completions(args, incomplete)
        flag, equals, _ = incomplete.partition("=")
        if not (equals and flag.startswith("--")):
            return found
        return [CompletionItem(f"{flag}={one.value}", one.type, one.help) for one in found]


class Zsh(_WholeWord, ZshComplete):
    """Zsh, which looks for paths itself, behind the flag if there is one."""

    source_template = ZshComplete.source_template.replace(
        "_path_files", "[[ $PREFIX == --*=* ]] && compset -P 1 '*='; _path_files"
    )


class Fish(_WholeWord, FishComplete):
    """Fish, which shows a description to its end."""

    source_template = FishComplete.source_template.replace(
        'string split "," $completion', 'string split --max 1 "," $completion'
    )


def register() -> None:
    """Let Click use these for their shells."""
    add_completion_class(Bash)
    add_completion_class(Zsh)
    add_completion_class(Fish)
