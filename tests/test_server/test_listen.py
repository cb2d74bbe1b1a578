# SPDX-License-Identifier: Apache-2.0
import socket

import pytest

from server.errors import ServerError
from server.listen import bind


def test_port_in_use_is_one_sentence_with_the_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} of 127\.0\.0\.1 is in use.*--port"):
            bind("127.0.0.1", port)


def test_clients_are_refused_until_the_socket_listens():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        listener.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_address_of_another_machine_is_refused():
    with pytest.raises(ServerError, match=r"192\.0\.2\.77"):  # TEST-NET-1 but not this machine's
        bind("192.0.2.77", 0)
