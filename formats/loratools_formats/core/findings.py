"""Findings: what readers and operations report about an adapter, with a code for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
"""`error`: the adapter's tensors do not determine its ΔW, so operations on ΔW refuse it. `warning`:
the result may not be what the user expects. `note`: good to know; nothing changes."""

CODES: Mapping[str, str] = {
    # Readers of all formats.
    "pickled-weights": "the weights are pickled",
    "unknown-tensors": "unknown tensors are carried along",
    "idle-modules": "modules of a single file have no factors, or none of any rank",
    "quantised-factors": "factors are stored in blocks of few bits and read as the rounded numbers",
    "norms-ignored": "llama.cpp ignores trained norms in an adapter",
    "config-missing": "the configuration that states the scale is missing",
    "scale-assumed": "the file holds no scale, so 1 is assumed",
    "activated-lora": "the adapter acts only after certain tokens of the prompt",
    "shared-set": "the file holds several adapters in shared bases",
    "shared-members": "which adapters a shared set holds",
    # PEFT folders.
    "mutated-base": "the initialisation changed the base weights before training",
    "unknown-config-key": "the configuration sets a key that is not known",
    "ignored-config-key": "an unknown configuration key is ignored, as requested",
    "experts-grouped": "B of stacked experts is packed expert by expert, unlike PEFT's",
    "unsupported-config-key": "the configuration sets a key whose effect is not supported",
    "alpha-not-positive": "an alpha is zero or negative",
    "multihead-attention": "PEFT applies a change twice, in an nn.MultiheadAttention",
    "latent-mapping-missing": "the trained matrices of LoRA-XS or LoRA-SB are missing",
    "no-weight-change": "the kind of adapter changes no weight",
    "left-to-loader": "the file lacks tensors that PEFT computes from the base",
    "weights-renamed": "the weights have another name than PEFT gives them",
    "weights-twice": "there are pickled weights beside safetensors, which are ignored",
    "foreign-files": "the folder has files that are not part of the adapter",
    "unreadable-attachment": "an entry beside the adapter is not a regular file",
    "nested-adapters": "sub-folders hold further adapters",
    "training-only": "tensors that are used in training only are carried along",
    "other-base": "the adapter names another base model than the one given",
    "wrapped-names": "names have parts that training code left there",
    "posterior-spread": "the spread of a Bayesian LoRA is left out of every output",
    "expert-order-doubtful": "a marker states an order of experts that does not fit the values",
    "expert-side-assumed": "only a release tells on which side A of square stacks of experts is",
    "expert-order-guessed": "factors of stacked experts are read in an assumed order",
    "projections-in-parts": "modules are parts of a projection that is one module in the model",
    "base-values": "tensors that replace the base's hold the base's own values",
    # What a format's own loader would leave out.
    "not-targeted": "the loader makes no layer for modules that the file holds",
    "targets-unclear": "it is not known for which modules the loader makes layers",
    "target-without-tensors": "the configuration names modules that the file does not hold",
    "pattern-unmatched": "a pattern of ranks or alphas matches no module",
    "classifier": "the fused model is a classifier now, and its configuration says so",
    # Writers.
    "dtype-fallback": "some factors cannot be stored in the type asked for",
    "head-alone": "a change is of the output layer alone, and Tinker's of a tied embedding, too",
    "head-of-both": "Tinker's change of the output layer is of the tied embedding, too",
    "alpha-of-others": "diffusers gives modules of a kohya file the alpha that most modules have",
    # Placing an adapter on its base, and fusing.
    "stays-tied": "the embedding and the output layer stay tied and change alike",
    "untied": "the embedding and the output layer are no longer tied",
    "tensor-added": "a tensor is added that the base does not have",
    "tensor-dropped": "a tensor is left out that the base does not have",
    "negative-weight": "a change that depends on the base's weights is subtracted",
    "widened": "weights in eight bits are stored in sixteen where they change",
    "vocabulary-resized": "the vocabulary has another size",
    "no-longer-quantised": "weights are stored in floating-point types now",
    "trained-on-four-bits": "an adapter's files say that its base was in four bits",
    "noisier-than-base": "quantising changed the weights by more than the adapter does",
    "rescaled-inputs": "the base's weights expect scaled inputs, unlike the original model's",
    "nearest-codes": "changed weights have the nearest codes; the format chose its own by data",
    "type-fallback": "tensors cannot be stored in the GGUF type asked for",
    "parts-joined": "the parts of a split model become one file",
    # Quantising and dequantising.
    "already-quantised": "weights are in four bits already",
    "experts-kept": "weights of experts stay as they are",
    "stacks-kept": "stacks of experts' weights stay as they are",
    "files-left-out": "files beside the base are not carried over",
    # Converting, extracting and merging.
    "experts-laid-out": "a layout needed factors of experts padded, doubled, folded or transposed",
    "experts-lost": "PEFT on transformers 5 loses parts of single experts when it stacks them",
    "dropout-left-out": "a dropout, which PEFT does not bear beside experts, is left out",
    "expert-halves-assumed": "only the sizes show that gate and up are joined in halves",
    "no-model-in-mlx": "mlx-lm has no model of the base's type",
    "base-unused": "the base model is not needed",
    "attachments-left-out": "the format has no place for the files beside the adapter",
    "names-stay": "names of modules stay, since no table of names is certain",
    "names-by-table": "modules are renamed by a table of names",
    "weightless-modules": "modules in which every adapter's weight is 0 are left out",
    "dropped-modules": "modules were taken out, as was asked for",
    "norms-left-out": "norms and biases that changed have no place in the format",
    "others-left-out": "tensors outside the components that adapters change are left out",
    "tied-skipped": "a tied tensor is not compared",
    "buffer-skipped": "a buffer that only one checkpoint stores is not compared",
    "one-sided-skipped": "a tensor that only one checkpoint stores is not compared",
    "head-carried": "a tensor of the task's head, which the base lacks, is carried whole",
    "different-bases": "the adapters name different base models",
    # Sharing bases.
    "alone-is-better": "squeezing each adapter alone to the size of a shared set may lose less",
    "shared-alone": "an adapter shares its basis with no other",
    # Measuring and comparing.
    "direction-only": "DoRA modules are given by their directions, since there is no base",
    "not-beside-base": "a module is not compared with its base weight",
    "rule-broken": "a rule of `check` found something in what is published",
    "no-reference": "an entry in the folder of references is not an adapter",
    "not-in-base": "the base does not have a module of the adapter",
    "names-kept": "an adapter keeps its own names, since the base model's are not known for it",
    "single-precision": "sums are of float32 within blocks, for speed",
    "leading-part": "changes of full rank are compared by their leading singular triplets",
    "not-in-both-bases": "a module is left out of a comparison of bases",
}
"""Code of every finding in this code base → its meaning."""


@dataclass(frozen=True)
class Finding:
    """Something worth telling about an adapter.

    Attributes:
        code: a stable name of the matter; those of this code base are in `CODES`.
        severity: how bad it is.
        where: the module, tensor, configuration key or file concerned; None for the whole adapter.
        message: what was found, for people.
        hint: what the user can do; empty for nothing.
    """

    code: str
    severity: Severity
    where: str | None
    message: str
    hint: str = ""
