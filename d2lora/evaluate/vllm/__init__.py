"""Benchmarks on vLLM, which runs in an environment and a process of its own."""
