"""Numbers without files: factor-space algebra, streamed decompositions, ranks and budgets."""
