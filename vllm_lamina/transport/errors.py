"""What can go wrong between a model worker and an attention worker; every text says what to change."""

from vllm_lamina.errors import LaminaError


class ConnectionFailed(LaminaError):
    """Base of the errors of this package's control plane."""


class UnsupportedAddress(ConnectionFailed, ValueError):
    """The address is malformed, or its host is not known."""


class SecretError(ConnectionFailed, ValueError):
    """A secret is missing, unfit or not the other side's."""


class WorkerUnreachable(ConnectionFailed):
    """No attention worker answers at the address, or it stopped answering."""


class WorkerRefused(ConnectionFailed):
    """The attention worker answered, and said no: it is busy, or the configuration does not fit."""


class ProtocolMismatch(ConnectionFailed):
    """The two sides run versions of vllm-lamina that do not understand each other."""


class UcxUnavailable(ConnectionFailed):
    """There is no usable UCX on this host, or no network device for it."""
