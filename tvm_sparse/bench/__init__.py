"""Benchmarks: sparse against dense in the same process, results checked before anything is timed."""
