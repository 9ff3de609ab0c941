"""Benchmarks beside other programs: the same weights and inputs, in turns, in one process."""
