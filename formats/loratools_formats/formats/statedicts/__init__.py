"""Bare state dicts that training code saves: one module for each producer; most are read only."""
