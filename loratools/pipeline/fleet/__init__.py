"""Fleets: one operation over thousands of adapters, in shards, in processes or on a cluster."""
