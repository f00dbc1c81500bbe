"""What the metadata of adapters says about their training and their sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

TRAINING_KEYS = frozenset(
    {
        "ss_bucket_info", "ss_dataset_dirs", "ss_datasets", "ss_reg_dataset_dirs",
        "ss_tag_frequency",
    }
)  # fmt: skip
"""Metadata that tells what somebody trained on: folders, captions, tags, image sizes."""


def without_training_data(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata without what tells about the training data."""
    return {key: value for key, value in metadata.items() if key not in TRAINING_KEYS}


def merged_from(sources: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return what the metadata of a merged file says about its sources: their titles.

    Source: `modelspec.merged_from` of the SAI model specification.
    """
    titles = [metadata["modelspec.title"] for metadata in sources if "modelspec.title" in metadata]
    known = [title for title in titles if title]
    return {"modelspec.merged_from": ", ".join(known)} if known else {}
