"""A base checkpoint: where its tensors are, what they hold, and the facts of its configuration."""
