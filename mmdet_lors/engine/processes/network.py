"""Finds the network interface that leads to another machine."""

import os
import socket
import struct
import sys

SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address."""


def interface_towards(address: str) -> str | None:
    """Name of the interface that packets to an address leave through; None if unknown, or on this machine itself.

    Works on Linux only: the request has another number elsewhere, and Windows has no ``fcntl``.
    """
    if sys.platform != "linux":
        return None
    try:
        import fcntl
    except ImportError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: this only looks up the route.
            probe.connect((address, 9))
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == own and not own.startswith("127."):
                return name
    return None


def let_gloo_find_its_interface() -> None:
    """Make gloo listen on the interface that leads to machine 0, unless ``GLOO_SOCKET_IFNAME`` says otherwise.

    By default it listens where the host's name resolves to, which is the loopback device on many machines, as in
    Debian's ``/etc/hosts``. Other machines cannot connect there.
    """
    name = interface_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
