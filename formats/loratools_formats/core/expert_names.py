"""Names of a mixture's experts and of their projections, as transformers and Mixtral say them."""

from __future__ import annotations

import re

GATED = ("gate_proj", "up_proj", "down_proj")
"""Projections of an expert, each a linear layer; one without a gate has the last two."""
OF_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
TO_MIXTRAL = {name: of_mixtral for of_mixtral, name in OF_MIXTRAL.items()}

LEAVES = "|".join(("gate_up_proj", *GATED, *OF_MIXTRAL))
SINGLE = re.compile(rf"(?P<owner>(?:.*\.)?experts)\.(?P<index>\d{{1,6}})\.(?P<leaf>{LEAVES})")
"""A projection of one expert, among experts one by one."""
LISTED = re.compile(r"(?P<owner>.*\bexperts)\.(?P<leaf>gate_up|down)_projs\.(?P<index>\d{1,6})")
"""A projection of one expert, among lists of projections."""
NUMBER = re.compile(r"\bexperts\.(\d{1,6})\.")
"""The number of the expert that a tensor belongs to."""
