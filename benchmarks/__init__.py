"""Benchmarks: ratios to stock TVM and to a raw socket, measured in interleaved rounds of one run."""
