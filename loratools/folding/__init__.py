"""Adapters of every kind as plain low-rank factors."""
