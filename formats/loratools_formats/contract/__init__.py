"""The contract between formats and operations: `Format`, the registry, reading and writing."""
