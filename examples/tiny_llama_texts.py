"""The texts that `make_tiny_llama.py` takes from the running Python."""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from pathlib import Path
from pydoc_data import topics

HELD_OUT = 0.1
SHORTEST = 64
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data"}
CODE_FILES = ["argparse.py", "textwrap.py", "shlex.py", "csv.py", "configparser.py"]
LANGUAGE_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def standard_library() -> Path:
    """Return the directory of the standard library in use."""
    return Path(sysconfig.get_path("stdlib"))


def documentation(seed: int, *, docstrings: bool = True) -> list[str]:
    """Collect the language reference of this Python, and docstrings, in shuffled order."""
    texts = {inspect.cleandoc(text) for text in topics.topics.values()}
    for path in sorted(standard_library().rglob("*.py")) if docstrings else ():
        if SKIPPED.intersection(path.relative_to(standard_library()).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            doc = ast.get_docstring(node) if isinstance(node, LANGUAGE_NODES) else None
            if doc and len(doc) > SHORTEST and doc.isascii():
                texts.add(doc)
    ordered = sorted(texts)
    random.Random(seed).shuffle(ordered)
    return ordered


def library_code() -> str:
    """Return some modules of the standard library without comments and docstrings."""
    modules = []
    for name in CODE_FILES:
        tree = ast.parse((standard_library() / name).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, LANGUAGE_NODES) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        modules.append(ast.unparse(tree))
    return "\n\n".join(modules) + "\n"


def split_text(text: str) -> tuple[str, str]:
    """Split a text at a line into a training part and a held-out last part."""
    cut = text.index("\n", int(len(text) * (1 - HELD_OUT))) + 1
    return text[:cut], text[cut:]
