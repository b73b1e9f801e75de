"""Keeps new connections from a listening TCP socket while there are too many."""

import ctypes
import os
import socket

# linux/filter.h and asm-generic/socket.h
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_BPF_RET = 0x06


class _Instruction(ctypes.Structure):
    """struct sock_filter"""

    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("operand", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


class ListeningSocket:
    """A TCP socket that listens, by the descriptor of who accepts its connections.

    Raises
    ------
    OSError
        The descriptor is none of a socket.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=os.dup(descriptor))

    def refuse(self) -> None:
        """Let the kernel drop what asks for a connection; peers ask again after a second, then after two, and so on.

        Connections stay, those too that wait to be accepted.

        Raises
        ------
        OSError
            The system has no such filter, or no memory for it.
        """
        keep_nothing = _Instruction(_BPF_RET, 0, 0, 0)
        program = _Program(1, ctypes.pointer(keep_nothing))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))

    def admit(self) -> None:
        """Take new connections again."""
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    def close(self) -> None:
        """The socket itself stays with its owner."""
        self._socket.close()
