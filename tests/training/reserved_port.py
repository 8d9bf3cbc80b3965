"""A port for the rendezvous of processes that are yet to start."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that the system gives to nobody meanwhile, and a listener may still take.

    A port that is only found to be free may be another connection's before a rank listens on it.
    """
    with socket.socket() as holder:
        # Listeners that set it too, as torch's do, may share an address with one that only holds.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
