"""Write docs/gguf-architectures.md from the generated rows: what is taken, what is refused and why.

python tests/consumers/make_gguf_docs.py
"""

from __future__ import annotations

from pathlib import Path

from loratools_formats.formats.gguf.architectures import ALL, REFUSED

OUT = Path(__file__).parents[2] / "docs" / "gguf-architectures.md"
_OTHERS = "transformers has no such class to compare with"
_PLAIN = "llama.cpp has no tensor for it"


def text():
    """Return the page."""
    lines = [
        "# Architectures of GGUF adapters", "",
        "Every class of language models that llama.cpp's converter (b10605) takes, and what",
        "becomes of it. Rows were made by running that converter; a test compares them again.", "",
        "## Taken", "", "| architecture | classes | modules that are refused, with the reason |",
        "| --- | --- | --- |",
    ]  # fmt: skip
    for row in sorted(ALL, key=lambda row: (row.name, min(row.classes))):
        why: dict[str, list[str]] = {}
        for path, reason in row.reasons.items():
            if reason != _PLAIN:
                why.setdefault(reason, []).append(path.replace("model.layers.#.", ""))
        told = "; ".join(f"{', '.join(sorted(p))}: {reason}" for reason, p in sorted(why.items()))
        classes = ", ".join(f"`{name}`" for name in sorted(row.classes))
        lines.append(f"| {row.name} | {classes} | {told} |".replace("#", "N"))
    lines += ["", "Modules that llama.cpp has no tensor for, such as those of a vision tower, are"]
    lines += ["refused too, unless `--drop` or `--allow-lossy` takes them out.", "", "## Refused"]
    lines += ["", "| class | reason |", "| --- | --- |"]
    lines += [f"| `{n}` | {why} |" for n, why in sorted(REFUSED.items()) if why != _OTHERS]
    lines += ["", "transformers has no class to compare the layout of these with, since they are"]
    lines += ["remote code or no models of their own:", ""]
    lines.append(", ".join(f"`{n}`" for n, why in sorted(REFUSED.items()) if why == _OTHERS) + ".")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
