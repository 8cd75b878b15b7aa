"""Benchmarks of the bounded KV cache: memory, speed and quality, each against the unbounded path in the same run."""
