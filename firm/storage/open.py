"""From a URI to a store. The environment is read when a store is opened, never at import."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from firm.records import UserError
from firm.storage.store import LocalStore, Store


def open_store(uri: str) -> Store:
    """Open a folder path, ``file:///folder``, ``s3://bucket/prefix`` or ``minio://bucket/prefix``.

    An S3 endpoint comes from FIRM_S3_ENDPOINT or AWS_ENDPOINT_URL (default for s3: AWS itself), credentials from
    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), the region from AWS_REGION. The server is not
    contacted yet.

    Raises:
        UserError: The URI or the environment does not say which store is meant.
    """
    scheme, separator, rest = uri.partition("://")
    if not uri or "\0" in uri:
        raise UserError("empty or impossible store URI", repr(uri), "give a folder or s3://bucket/prefix", usage=True)
    if not separator:
        return LocalStore(Path(uri))
    if scheme == "file":
        if not rest.startswith("/"):
            raise UserError("a file URI needs three slashes", uri, "write file:///absolute/folder", usage=True)
        return LocalStore(Path(unquote(rest)))
    if scheme not in ("s3", "minio"):
        raise UserError(f"unknown store scheme {scheme!r}", uri, "use a folder, file://, s3:// or minio://", usage=True)
    from firm.storage.s3 import S3Store  # takes a quarter of a second to import, and local runs do not need it

    return S3Store(uri)
