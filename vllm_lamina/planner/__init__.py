"""Answers, before anything is rented, whether moving attention pays, with which devices, and what it brings.

Read in this order: `devices` and `models` (what there is), `cost` and `network` (time of one operator), `deployment`
(operators on machines), `pipeline` (steps of several batches), `traces` and `simulator` (a workload over time),
`search` and `command` (the answer). Nothing here needs vLLM, torch or a GPU.
"""
