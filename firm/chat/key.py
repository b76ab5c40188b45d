"""The key of a server, and where there must be one."""

from __future__ import annotations

import ipaddress
import os
import socket

from firm.records import UserError


def read_key(host: str, name: str, optional: bool) -> str:
    """The key that requests must carry: what the environment variable ``name`` holds, which may be empty.

    Raises:
        UserError: It is empty but not optional, and others than this machine can reach the address.
    """
    key = os.environ.get(name, "").strip()
    if key or optional:
        return key
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"there is no such host: {error}", host, "choose another --host", usage=True) from error
    if not ipaddress.ip_address(address).is_loopback:
        what = "without a key, whoever reaches the address can use the server"
        fix = f"put a key into the environment variable {name}, or say --no-key if something else keeps strangers out"
        raise UserError(what, f"--host {host}", fix, usage=True)
    return ""
