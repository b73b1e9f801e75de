"""Attention workers as Ray actors: a deployment outlives the engine that made it, and removes itself when unused.

`actor` runs on the memory machines, `cluster` makes and removes deployments, `driver` is the engine's end of a process
that talks with Ray (`driver_process`), so that neither Ray's threads nor its signal handlers are in vLLM's processes.
"""
