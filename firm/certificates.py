"""Whom this program trusts at the other end of a TLS connection: the public authorities, and those of the user."""

from __future__ import annotations

import os
import ssl

import certifi

from firm.records import UserError

CA_BUNDLE = "FIRM_CA_BUNDLE"
"""Environment variable: a PEM file of authorities that are trusted besides the public ones."""
TRUST = f"set {CA_BUNDLE} to a PEM file with the authority that signed the server's certificate, or correct the address"


def tls_context(*variables: str) -> ssl.SSLContext:
    """What checks a server's certificate and name.

    ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` stand in for the public authorities; the files that `CA_BUNDLE` and the
    environment variables ``variables`` name are trusted as well.

    Raises:
        UserError: A file that a variable names cannot be read, or holds no certificate (exit code 2).
    """
    env = os.environ
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    public = "SSL_CERT_FILE" if env.get("SSL_CERT_FILE") else ""
    _load(context, public, env.get("SSL_CERT_FILE") or certifi.where())
    if folder := env.get("SSL_CERT_DIR"):
        context.load_verify_locations(capath=folder)
    for variable in (*variables, CA_BUNDLE):
        if path := env.get(variable):
            _load(context, variable, path)
    return context


def _load(context: ssl.SSLContext, variable: str, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        what = "holds no certificate" if isinstance(error, ssl.SSLError) else f"cannot be read: {error.strerror}"
        fix = "correct it, or unset the variable"
        raise UserError(f"the file of trusted authorities {what}", f"{path}, {variable}", fix, usage=True) from error


def distrust(error: BaseException | None) -> str:
    """Why a server's certificate was refused, in OpenSSL's words; empty if ``error`` has another cause."""
    while error:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return ""
