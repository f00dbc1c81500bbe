"""Rules about files: what lies beside the tensors, what could run, what hides."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratools.operations.check.remedy import Remedy
from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.subject import Subject
from loratools_formats.core.file_names import ADAPTER_CONFIG, PICKLE_ENDINGS, PICKLED_PEFT_WEIGHTS
from loratools_formats.disk.errors import LoratoolsError, printable
from loratools_formats.disk.files import inside, read_small_file

_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1", ".js",
         ".jar", ".ipynb")  # fmt: skip
_PICKLES = (*PICKLE_ENDINGS, ".pkl", ".pickle", ".joblib", ".dill")
_CODE_KEYS = ("auto_map", "auto_mapping", "custom_code", "parent_library", "trust_remote_code")
_LIBRARIES = ("torch", "transformers", "diffusers", "sentence_transformers", "timm", "peft")
_CODE_TEXT = re.compile(
    r"__import__|__builtins__|__subclasses__|\b(?:eval|exec|compile)\s*\(|os\.system|subprocess\."
    r"|\bimportlib\b"
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_MOST_METADATA = 1 << 16
_MOST_TOKENIZER_BYTES = 1 << 20


def _code_files(subject: Subject) -> Iterator[Found]:
    for entry in subject.entries:
        runs = entry.name.lower().endswith(_CODE) or _is_executable(entry)
        if entry.is_file(follow_symlinks=False) and runs:
            yield Found(f"{entry.name} can be run", entry.name, entry.name)


def _is_executable(entry: os.DirEntry[str]) -> bool:
    if not entry.is_file(follow_symlinks=False) or "." in entry.name[1:]:
        return False
    return bool(entry.stat(follow_symlinks=False).st_mode & 0o111)


def _pickles_beside(subject: Subject) -> Iterator[Found]:
    for entry in subject.entries:
        if entry.name.lower().endswith(_PICKLES) and entry.name != PICKLED_PEFT_WEIGHTS:
            yield Found(f"{entry.name} is a pickle, and no part of it", entry.name, entry.name)


def _links_outside(subject: Subject) -> Iterator[Found]:
    for entry in subject.entries:
        if subject.folder is None or not entry.is_symlink():
            continue
        try:
            inside(subject.folder, entry.name)
        except LoratoolsError:
            yield Found(f"{entry.name} is a link out of the folder", entry.name, entry.name)


def _code_in_config(subject: Subject) -> Iterator[Found]:
    config = subject.config
    for key in _CODE_KEYS:
        if config.get(key) and not _is_library(config[key]):
            shown = printable(config[key], 80)
            yield Found(f"{key} names code to import: {shown}", key, ADAPTER_CONFIG)
    for key, value in config.items():
        text = next((t for t in _texts(value) if _CODE_TEXT.search(t)), None)
        if text is not None:
            yield Found(
                f"{key} holds what looks like code: {printable(text, 80)}", key, ADAPTER_CONFIG
            )


def _is_library(value: Any) -> bool:
    """Return whether an `auto_mapping` is PEFT's own: it names the library of the base's class."""
    parent = value.get("parent_library") if isinstance(value, dict) else None
    return isinstance(parent, str) and parent.partition(".")[0] in _LIBRARIES


def _texts(value: Any) -> Iterator[str]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, list):
            pending += item


def _chat_template(subject: Subject) -> Iterator[Found]:
    for entry in subject.entries:
        if entry.name in _TEMPLATES:
            yield Found(
                "a chat template lies beside it, which is a program", entry.name, entry.name
            )
    name = "tokenizer_config.json"
    if subject.folder is not None and any(entry.name == name for entry in subject.entries):
        try:
            text = read_small_file(inside(subject.folder, name), _MOST_TOKENIZER_BYTES)
        except LoratoolsError as error:
            yield Found(f"{name} was not read: {error.message}", name, name)
            return
        if b'"chat_template"' in text:
            yield Found(f"{name} holds a chat template, which is a program", name, name)


def _metadata(subject: Subject) -> Iterator[Found]:
    if subject.adapter is None:
        return
    size = sum(len(key) + len(text) for key, text in subject.adapter.metadata.items())
    if size > _MOST_METADATA:
        yield Found(f"the header of the weights holds {size:,} characters of metadata")


def _odd_names(subject: Subject) -> Iterator[Found]:
    for name in (*subject.tensors, *(entry.name for entry in subject.entries)):
        if not name.isprintable():
            yield Found(f"the name {printable(name)} holds characters that do not show", name)


def _pickled(subject: Subject) -> Iterator[Found]:
    if subject.path is None or subject.adapter is None or not subject.adapter.inputs:
        return
    name = Path(subject.adapter.inputs[0].path).name
    if name.lower().endswith(_PICKLES):
        peft = subject.adapter.format == "peft"
        remedy = Remedy("rewrite", "peft") if peft else None
        yield Found(f"the weights are pickled ({name})", name, name, remedy=remedy)


RULES = (
    Rule(
        "LT001", "unreadable", "error",
        "The adapter cannot be read, or not all of it.",
        "Parts that cannot be read were not checked, and loaders will treat them "
        "differently. This finding cannot be ignored or accepted.",
        "Do what the message says; save the adapter again if the file is damaged.",
        "The readers of loratools, each after the library that writes the format",
    ),
    Rule(
        "LT002", "pickled-weights", "warning",
        "The weights are a pickle.",
        "Loading a pickle without restrictions runs what is in it. loratools reads the tensors in "
        "a child process that can make nothing but tensors.",
        "Store them as safetensors: `loratools convert ADAPTER -o NEW --to peft`.",
        "torch.load, section on untrusted models; picklescan",
        _pickled, of_readers=("pickled-weights",),
    ),
    Rule(
        "LT003", "weights-twice", "warning",
        "Pickled weights lie beside safetensors.",
        "Loaders take one of the two, but not all take the same one.",
        "Remove adapter_model.bin.",
        "peft.utils.save_and_load, 0.21.2",
        of_readers=("weights-twice",),
    ),
    Rule(
        "LT004", "code-files", "warning",
        "There is a program in the folder.",
        "An adapter needs no code, and other files in its folder are downloaded with it.",
        "Remove the file, or keep it in another repository.",
        "Hugging Face Hub, pages on security",
        _code_files,
    ),
    Rule(
        "LT005", "pickles-beside", "warning",
        "There is a pickle beside the adapter, such as an optimizer's state.",
        "Nobody needs it to use the adapter, and loading it runs what is in it.",
        "Remove the file.",
        "transformers.Trainer writes optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin",
        _pickles_beside,
    ),
    Rule(
        "LT006", "link-outside", "warning",
        "A link leads out of the folder.",
        "In a copy of the folder, the link leads to another file.",
        "Put the file itself into the folder.",
        "CWE-59",
        _links_outside,
    ),
    Rule(
        "LT007", "code-in-config", "warning",
        "The configuration names code to import, or holds what looks like code.",
        "When PEFT loads the adapter, it imports the module that auto_mapping names. The "
        "rule ignores the libraries that PEFT adapts.",
        "Remove the key if the adapter works without it.",
        "`_get_peft_type` and `auto_mapping` in peft 0.21.2",
        _code_in_config,
    ),
    Rule(
        "LT008", "chat-template", "note",
        "A chat template comes with the adapter.",
        "Chat templates are Jinja programs, which the tokenizer runs. Read it before you use it.",
        "Remove it if it is the base model's own.",
        "transformers, chat templates",
        _chat_template,
    ),
    Rule(
        "LT009", "foreign-files", "note",
        "The folder has files that are not part of an adapter.",
        "They are published with it.",
        "Remove the files that nobody needs.",
        "The reader of PEFT folders",
        of_readers=("foreign-files",),
    ),
    Rule(
        "LT010", "nested-adapters", "note",
        "Sub-folders hold further adapters.",
        "Loaders take the one at the top. The others are not checked here.",
        "Check each sub-folder by its own path.",
        "The reader of PEFT folders",
        of_readers=("nested-adapters",),
    ),
    Rule(
        "LT011", "large-metadata", "note",
        "The header of the weights holds much text besides the tensors.",
        "Training tools put captions and paths there, which are published with the weights.",
        "Leave out the text about the training: "
        "`loratools convert ADAPTER -o NEW.safetensors --to kohya --strip-training-metadata`.",
        "kohya's ss_* entries",
        _metadata,
    ),
    Rule(
        "LT012", "odd-names", "warning",
        "A name has invisible characters.",
        "Two names that look the same may then differ.",
        "Rename the tensor or the file.",
        "Unicode Technical Report 36",
        _odd_names,
    ),
    Rule(
        "LT013", "weights-renamed", "warning",
        "The weights have another name than PEFT gives them.",
        "PEFT and the programs that serve its adapters look for adapter_model.safetensors.",
        "Rename the file, or write it again: `loratools convert ADAPTER -o NEW --to peft`.",
        "peft.utils.save_and_load, 0.21.2",
        of_readers=("weights-renamed",),
    ),
    Rule(
        "LT014", "unreadable-attachment", "warning",
        "An entry beside the adapter is not a regular file: it is a dangling link, a pipe or "
        "a folder.",
        "Copies and uploads leave it out, or fail on it.",
        "Put the file itself there, or remove the link.",
        "The reader of PEFT folders",
        of_readers=("unreadable-attachment",),
    ),
    Rule(
        "LT015", "shared-set", "note",
        "The file holds several adapters in shared bases.",
        "No program loads it. Each adapter must be taken out first.",
        "Take one out: `loratools fleet unshare SHARED NAME -o NEW`, and check that.",
        "The format of `loratools fleet share`",
        of_readers=("shared-set", "shared-members"),
    ),
)  # fmt: skip
