"""How adapters relate: angles, shared spaces, signs, merges, lineages; and two bases at an adapter."""
