"""What is in an adapter: spectra, ranks, strength, anomalies, and its place in the base."""
