"""Adapters without what their spectra find fault with: intruders, dead modules, imbalance."""
