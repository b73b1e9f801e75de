"""Errors a user of Lamina may meet; each message says what was wrong, the value, and what to change."""


class LaminaError(RuntimeError):
    """Base of every error that Lamina raises on purpose."""


class ConfigError(LaminaError, ValueError):
    """An option has a value, or a combination of values, that cannot work."""


class UnsupportedError(LaminaError):
    """The model or the engine asks for a feature that Lamina does not implement."""
