"""Benchmarks, installed as ``ffw_fast.benchmarks``: ``ffw-fast bench`` runs them."""
