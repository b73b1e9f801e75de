"""Scheduling of two staggered batches over one model worker."""
