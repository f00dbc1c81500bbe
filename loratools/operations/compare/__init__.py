"""How adapters relate: angles, spaces, signs, merges, lineages; and bases at an adapter."""
