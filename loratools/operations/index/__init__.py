"""An index of many adapters: sketches of their changes, nearest neighbours, duplicates."""
