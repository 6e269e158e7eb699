"""The web of the hostile tests, and their guard. Python loads it in every process that has this folder on its
path; it does something where TEST_WORLD names the world's folder.

Names that end in .test have addresses, public or private; connections to public ones go to the test's server
on 127.0.0.1. The guard: whatever leaves for another address than a loopback one is written down and refused
before it leaves the process, by an audit hook, that is below whatever is patched or bypassed above.
"""

import ipaddress
import json
import os
import signal
import socket
import sys
import time
import zlib
from pathlib import Path
from typing import Any

WORLD = os.environ.get("TEST_WORLD")
PUBLIC = "93.184."  # what .test names have by default
ODD_NAMES = {
    "inside.test": ["10.0.0.7"],
    "metadata.test": ["169.254.169.254"],
    "local.test": ["127.0.0.1"],
    "both.test": ["192.168.0.9", "93.184.1.1"],
    "many.test": [f"93.185.{i}.1" for i in range(200)],  # nobody answers there
}


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    asks = event in ("socket.getaddrinfo", "socket.gethostbyname")
    if asks:
        target = (arguments[0],)
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        target = arguments[1]
    else:
        return
    if not isinstance(target, tuple) or not target[0]:
        return  # a socket of this machine
    host = target[0].decode() if isinstance(target[0], bytes) else str(target[0])
    try:
        fine = ipaddress.ip_address(host).is_loopback or asks  # an address is no question to anybody
    except ValueError:
        fine = host == "localhost"
    if not fine:
        with Path(str(WORLD), "blocked.txt").open("a") as file:
            file.write(f"{event} {host}\n")
        raise PermissionError(1, f"the guard blocked {event} to {host}")


def _names(host: Any, port: Any, *arguments: Any, **named: Any) -> Any:
    name = str(host)
    if name == "hanging.test":
        time.sleep(3600)
    if name in ODD_NAMES:
        addresses = ODD_NAMES[name]
    elif name.endswith(".test"):
        addresses = [f"{PUBLIC}{zlib.crc32(name.encode()) % 250}.{1 + len(name)}"]
    elif name.endswith(".invalid"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    else:
        return _getaddrinfo(host, port, *arguments, **named)
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0)) for address in addresses]


def _connect(self: socket.socket, address: Any) -> None:
    if isinstance(address, tuple) and str(address[0]).startswith(PUBLIC):
        ports = json.loads(Path(str(WORLD), "ports.json").read_text())
        address = ("127.0.0.1", ports[str(address[1])])
    elif isinstance(address, tuple) and str(address[0]).startswith("93.185."):
        raise TimeoutError("timed out")
    _plain_connect(self, address)


if WORLD:
    _getaddrinfo, _plain_connect = socket.getaddrinfo, socket.socket.connect
    socket.getaddrinfo = _names
    socket.socket.connect = _connect  # type: ignore[assignment,method-assign]
    sys.addaudithook(_guard)


def _open_badly(stream: Any, *arguments: Any, **named: Any) -> Any:
    """Pictures that a decoder of native code does not survive: by their last bytes."""
    data = stream.getvalue()
    if data.endswith(b"stuck"):
        time.sleep(3600)
    if data.endswith(b"crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return _open(stream, *arguments, **named)


if os.environ.get("TEST_BAD_DECODER"):
    from PIL import Image

    _open, Image.open = Image.open, _open_badly
