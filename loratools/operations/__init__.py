"""What can be done with adapters and checkpoints: one module or package for each operation."""
