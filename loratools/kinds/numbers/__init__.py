"""Numbers that kinds are defined by: random streams, wavelet filters and activations."""
