"""What an adapter is in memory: dtypes, tensors, weight changes and their orientation."""
