"""Names of modules: flattened and dotted, original and diffusers', and the ways between them.

Leaves and scales need no names, and flattening none either. Undoing it needs a list of names, and
going between an architecture's two namings needs a table, since modules are fused in the one and
split in the other. Tables are data, in `data/`, one file for each architecture.
"""
