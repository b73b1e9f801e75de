"""Every touch of a vLLM internal that is not a documented extension point; tests/compat names what each relies on."""
