"""The conformance kit under its public name; `loratools_formats.contract.testing` has it."""

from loratools_formats.contract.testing import FormatConformance

__all__ = ["FormatConformance"]
