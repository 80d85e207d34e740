"""Benchmark kinds and the reader of answers. No torch here."""
