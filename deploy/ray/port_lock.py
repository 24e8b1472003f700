"""One server per address and port of a machine.

Ray Serve listens with SO_REUSEPORT, so that the kernel refuses no second server: both would get connections, at random.
Hence a lock, and a look at who else listens. The lock is a name among the kernel's abstract Unix sockets: they belong
to the network namespace, as ports do, so that it holds between users, containers and private /tmp folders; no file is
left over or has an owner; the kernel tells who holds it, and frees it when that process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from divisi.cluster.errors import DivisiError

_NAMES = "divisi/port"
_TURN_S = 10.0
"""Longest wait for others who are taking a lock at this moment; each needs about a millisecond."""
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class PortTaken(DivisiError, ValueError):
    """The address cannot be listened on; the text says who holds it, or what is wrong with it."""


@contextlib.contextmanager
def hold_port(host: str, port: int) -> Iterator[None]:
    """Hold an address and port of this machine against every other server. Port 0 is a free one, which needs no lock.

    All addresses of the machine (0.0.0.0, ::) conflict with each of them. Raises PortTaken. Like the port itself, the
    lock would pass to processes forked without exec.
    """
    if port == 0:
        yield
        return
    address = resolve(host, port)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        with _turn(port):
            for other in _held(port):
                if _conflict(address, other):
                    raise PortTaken(_taken(host, port, _holder(port, other)))
            try:
                lock.bind(_name(port, address))
            except OSError:  # /proc, which lists the others, is not to be read
                raise PortTaken(_taken(host, port, _holder(port, address))) from None
            lock.listen()
        _probe(host, port, address)
        yield


def resolve(host: str, port: int) -> _Address:
    """The address of this machine to listen on. Raises PortTaken where the name has none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise PortTaken(
            f"http.host: {host!r} has no address ({error.strerror}); give one of this machine, or 0.0.0.0 for all"
        ) from None
    return ipaddress.ip_address(str(found).partition("%")[0])


def _conflict(one: _Address, other: _Address) -> bool:
    """Whether the kernel sends some connections to both. A socket of :: takes IPv4 as well."""
    one, other = (_plain(address) for address in (one, other))
    if one == other:
        return True
    return any(
        wide.is_unspecified and (wide.version == 6 or narrow.version == 4)
        for wide, narrow in ((one, other), (other, one))
    )


def _plain(address: _Address) -> _Address:
    """An IPv4 address that is written as IPv6 (::ffff:127.0.0.1) is the IPv4 address."""
    return (address.version == 6 and address.ipv4_mapped) or address


def _name(port: int, address: _Address) -> str:
    return f"\0{_NAMES}/{port}/{address}"


@contextlib.contextmanager
def _turn(port: int) -> Iterator[None]:
    """One at a time looks for others and takes its lock: two that begin together must not both see nobody, or both see
    the other. Raises PortTaken where somebody does not finish."""
    until = time.monotonic() + _TURN_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mutex:
        while True:
            try:
                mutex.bind(f"\0{_NAMES}/{port}")
                break
            except OSError:
                if time.monotonic() > until:
                    raise PortTaken(f"port {port}: another process has been taking it for {_TURN_S:.0f} s") from None
                time.sleep(0.01)  # nothing tells when a name becomes free
        yield


def _held(port: int) -> list[_Address]:
    """Addresses whose lock somebody holds for this port; the kernel shows the first byte of the names as @."""
    prefix = f"@{_NAMES}/{port}/"
    try:
        lines = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    names = {words[-1] for line in lines if (words := line.split()) and words[-1].startswith(prefix)}
    found = []
    for name in sorted(names):
        with contextlib.suppress(ValueError):  # not one of ours
            found.append(ipaddress.ip_address(name.removeprefix(prefix)))
    return found


def _holder(port: int, address: _Address) -> int | None:
    """Process id of who listens at a lock; None where it is of another process namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(_name(port, address))
            peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return None
    pid: int = struct.unpack("3i", peer)[0]
    return pid or None


def _probe(host: str, port: int, address: _Address) -> None:
    """Raise PortTaken where a server without the lock listens, or nobody can: bind as Ray Serve does not, alone.

    SO_REUSEADDR, which here only allows for connections that a former server left behind.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(_in_use(host, port, address)) from None
            raise PortTaken(
                f"cannot listen on {_shown(host)}:{port}: {error.strerror}; give another --host or --port"
            ) from None


def _in_use(host: str, port: int, address: _Address) -> str:
    """Who listens on the port, or that nobody does."""
    try:
        listening = [found for found in psutil.net_connections("tcp") if found.status == psutil.CONN_LISTEN]
    except (psutil.Error, OSError):
        return _taken(host, port, None)
    for found in listening:
        there = ipaddress.ip_address(found.laddr.ip.partition("%")[0])
        if found.laddr.port == port and _conflict(address, there):
            return _taken(host, port, found.pid)
    return (
        f"{_shown(host)}:{port} is bound by a process that does not listen, or a server that ended left connections; "
        f"these end within a minute: try again then, or give another --port"
    )


def _taken(host: str, port: int, pid: int | None) -> str:
    who = "another process, of another user or container"
    if pid is not None:
        who = f"process {pid}"
        with contextlib.suppress(psutil.Error):
            command = " ".join(psutil.Process(pid).cmdline())
            who += f" ({command if len(command) <= 100 else command[:99] + '…'})"
    return f"{_shown(host)}:{port} is held by {who}; stop it, or give another --port"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
