# SPDX-License-Identifier: Apache-2.0
"""The listening socket of the server. It is taken before the model is loaded, so that a busy port costs
nothing.
"""

import errno
import socket

from server.errors import ServerError


def bind(host: str, port: int) -> socket.socket:
    """Return a TCP socket bound to ``host`` and ``port`` that does not listen yet.

    Until it listens, clients are refused at once instead of waiting for a model that is still loading.

    Raises:
        ServerError: the port is in use, needs privileges, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ServerError(
            f"--host {host} cannot be resolved ({error.strerror}): give an address of this machine"
        ) from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServerError(
                f"port {port} of {host} is in use: stop the program that listens there or give another --port"
            ) from None
        if error.errno == errno.EACCES:
            raise ServerError(
                f"port {port} needs privileges that this process lacks: give a --port above 1023"
            ) from None
        raise ServerError(
            f"cannot listen on {host}:{port} ({error.strerror}): give an address of this machine with --host"
        ) from None
    return listener
