"""Tools for LoRA adapter files: exact operations on the true weight change ΔW, in factor space.

One module per operation, such as `loratools.operations.squeeze`; adapters are read and written by
`loratools_formats`. Importing this package imports nothing else.
"""

__version__ = "0.1.0"
