"""Adapters of one base model in shared bases: making sets, adding to them, taking adapters out."""
