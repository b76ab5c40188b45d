"""A certificate authority of these tests, and an S3 server that has its certificate."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3
from minio import Minio
from servers import free_port, started

NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True)
class Certificate:
    """PEM files of a certificate and its key."""

    file: Path
    key: Path


class Authority:
    """Makes itself a self-signed certificate in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.file, self._key = folder / "ca.crt", folder / "ca.key"
        self._make(self.file, self._key, "Private CA", "keyUsage=critical,keyCertSign")

    def certificate(self, name: str) -> Certificate:
        """Of a server; ``name`` such as ``IP:127.0.0.1`` or ``DNS:example.com``."""
        file, key = self._folder / "server.crt", self._folder / "server.key"
        signed = ["-CA", str(self.file), "-CAkey", str(self._key)]
        extensions = (f"subjectAltName={name}", "basicConstraints=critical,CA:FALSE")
        self._make(file, key, "server", *extensions, more=signed)
        return Certificate(file, key)

    def _make(self, file: Path, key: Path, subject: str, *extensions: str, more: list[str] | None = None) -> None:
        command = ["openssl", "req", "-x509", "-days", "2", "-subj", f"/CN={subject}", *NEW_KEY, *(more or [])]
        command += ["-out", str(file), "-keyout", str(key)]
        command += [word for extension in extensions for word in ("-addext", extension)]
        subprocess.run(command, check=True, capture_output=True)


@contextmanager
def moto(authority: Authority, bucket: str, host: str = "127.0.0.1") -> Iterator[str]:
    """Host and port of an S3 server behind TLS, which has the bucket and accepts any keys."""
    port = free_port(host)
    certificate = authority.certificate(f"IP:{host}")
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port), "--ssl"]
    command += ["--ssl-cert", str(certificate.file), "--ssl-key", str(certificate.key)]
    with started(command):
        pool = urllib3.PoolManager(ca_certs=str(authority.file), retries=urllib3.Retry(20, backoff_factor=0.1))
        Minio(f"{host}:{port}", "key", "secret", region="us-east-1", http_client=pool).make_bucket(bucket)
        yield f"{host}:{port}"
