"""A plugin that registers something else."""

METHOD = "a method"
