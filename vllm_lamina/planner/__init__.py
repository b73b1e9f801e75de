"""Answers, before anything is rented, whether moving attention pays, with which devices, and what it brings.

Read in this order: `devices` and `models` (what there is), `cost` (time of one operator or message), `deployment`
(operators on machines), `traces` and `simulator` (a workload over time), `results` (what comes of it, or of a
steady state), `search`, `report` and `command` (the answer). `calibrate` and `engine_steps` measure this host.
Only `vllm_lamina.cli.plan` imports it, and it needs neither vLLM nor torch nor a GPU but where it measures them.
"""
