"""Arithmetic that knows nothing of the book: distances, the rounding of sums, checks of values, GPU kernels."""
