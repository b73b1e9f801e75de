"""Attention workers as Ray actors: a deployment outlives the engine that made it, and removes itself when unused.

`actor` runs on the memory machines; `cluster` makes and removes deployments, for ``vllm-lamina ray``. Both import Ray:
an engine runs that command instead (`executor.sources.on_ray`).
"""
