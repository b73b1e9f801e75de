"""The shared secret of a deployment: its file, and the CurveZMQ keys that both sides derive from it."""

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from vllm_lamina.transport.errors import SecretError

MIN_SECRET_BYTES = 32
MAX_SECRET_BYTES = 4096

MAKE_ONE = "make one with `vllm-lamina secret FILE` and copy it to every machine"


@dataclass(frozen=True)
class ControlKeys:
    """Key pairs of the control connection, in Z85: who holds the secret holds both.

    The client must know the worker's public key to begin, and the worker admits the one client key only. So both
    sides prove that they hold the secret, and every connection has session keys of its own (forward secrecy).
    """

    worker_public: bytes
    worker_secret: bytes
    client_public: bytes
    client_secret: bytes

    @classmethod
    def from_secret(cls, secret: bytes) -> "ControlKeys":
        """Derive the keys: BLAKE2b of the secret, personalised by role, is the Curve25519 secret key."""
        worker, client = (
            z85.encode(hashlib.blake2b(secret, digest_size=32, person=role).digest())
            for role in (b"lamina worker", b"lamina client")
        )
        return cls(zmq.curve_public(worker), worker, zmq.curve_public(client), client)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "ControlKeys":
        """Derive the keys from a secret file: any 32 bytes or more that cannot be guessed.

        White space at either end does not count, so that a copied line is the same secret.

        Raises
        ------
        SecretError
            The file cannot be read, others than its owner may read it, or it is too short or too long.
        """
        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(MAX_SECRET_BYTES + 1)
        except OSError as error:
            raise SecretError(
                f"the secret file {os.fspath(path)!r} cannot be read ({error.strerror}); correct the path, or "
                f"{MAKE_ONE}"
            ) from error
        if mode & 0o077:
            raise SecretError(
                f"the secret file {os.fspath(path)!r} can be read by others than its owner; run: chmod 600 {path}"
            )
        secret = content.strip()
        if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
            raise SecretError(
                f"the secret file {os.fspath(path)!r} does not hold {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes; "
                f"{MAKE_ONE}"
            )
        return cls.from_secret(secret)


def write_secret(path: Path) -> None:
    """Write a new secret to a new file that only its owner can read. Raises FileExistsError and other OSErrors."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(MIN_SECRET_BYTES) + "\n")
