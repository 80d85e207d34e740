"""Benchmarks on the model in memory."""
