"""The two workers: the model worker inside vLLM, and the attention worker, a process without vLLM."""
