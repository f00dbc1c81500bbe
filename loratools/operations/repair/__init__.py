"""Adapters without the faults that their spectra show: intruders, dead modules, imbalance."""
