"""What runs in vLLM's worker: the model without its KV cache, and the client side of the exchange."""
