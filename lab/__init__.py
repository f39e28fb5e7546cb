"""The laboratory: comparisons of methods, ground truth, benchmarks, statistics and pictures."""
