"""Another package that claims a name which is taken."""

from loratools.operations.merge.methods import Method

ALTERNATE = Method("demo_alternate", "span", "Mine.", "nobody 2026", lambda gram, weights: weights)
