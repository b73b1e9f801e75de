"""Lamina's scheduler, of three parts: a ledger of the steps in flight, the placement of KV blocks, and lanes."""
