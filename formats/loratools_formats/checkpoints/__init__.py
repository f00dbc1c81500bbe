"""Base checkpoints: reading headers, writing shards, and the layouts of quantised weights."""
