"""Where in a base checkpoint each change of an adapter goes; names and shapes, hardly any bytes.

Adapters name modules as the model class does that they were trained with, checkpoints name tensors
as the class did that saved them. Prefixes differ, projections are fused on one side and split on
the other, experts are stacked or not, and tied weights are stored once. `rules` holds the facts as
tables, `names` finds tensors, `fused` and `experts` cut outputs, `tied` follows shared embeddings.

Only where an adapter changes both ends of a tied embedding are tensors of the adapter read, to
learn whether the two changes are one.
"""

from loratools.base.placement.changes import (
    BiasPlacement,
    Placement,
    Placements,
    Span,
)
from loratools.base.placement.place import place

__all__ = ["BiasPlacement", "Placement", "Placements", "Span", "place"]
