"""The S3 side of `firm.storage.store`, the only user of the minio client: timeouts, retries, errors for people."""

from __future__ import annotations

import errno
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.commonconfig import ComposeSource
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from minio.helpers import check_bucket_name
from tenacity import RetryCallState, Retrying, before_sleep_log, retry_if_exception, wait_random_exponential
from urllib3.exceptions import HTTPError, SSLError
from urllib3.response import BaseHTTPResponse

from firm.certificates import TRUST, distrust, tls_context
from firm.records import UserError
from firm.storage.files import atomic_write, check_key, disk_error

DEADLINE_S = 60.0  # of one operation, retries included
FIRST_CONTACT_S = 5.0  # the same for a server that never answered: most likely the address is wrong
TIMEOUT_S = 30.0  # urllib3 applies the connect timeout to sending one body as well, so parts must fit in it
COPY_TIMEOUT_S = 600.0  # of one object, or 5 GiB of it
PART_BYTES = 8 * 2**20
MAX_PARTS = 10_000  # S3's own limit

_KEYS = ("S3 refused the credentials", "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
_FULL = ("the disks of the S3 server are full", "free some space there and run again; finished files are kept")
_UNCONDITIONAL = (
    "this S3 server has no conditional writes (If-None-Match), without which two runs could harm each other's work",
    "use AWS, MinIO or another server that has them, perhaps a newer version of this one",
)
_FAULTS = {  # error code of S3 -> what it means, what to do
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "InvalidToken": _KEYS,
    "ExpiredToken": _KEYS,
    "AccessDenied": ("S3 denied access", "check the access keys, and that their policy allows this bucket and prefix"),
    "NoSuchBucket": ("bucket does not exist", "create it, or correct the URI"),
    "NoSuchKey": ("no such object", "check the URI; has the stage that writes it finished?"),
    "RequestTimeTooSkewed": ("the clocks of this machine and of S3 differ", "set the clock"),
    "NotImplemented": _UNCONDITIONAL,
    "XMinioStorageFull": _FULL,
    "XMinioAdminBucketQuotaExceeded": _FULL,
}
_FORBIDDEN = 403
_PASSING = {429, 500, 502, 503, 504}
_log = logging.getLogger(__name__)
T = TypeVar("T")


class S3Store:
    """A prefix in a bucket of MinIO, AWS or another S3 server. Safe to share between threads."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        scheme, _, rest = self.uri.partition("://")
        self._bucket, _, prefix = rest.partition("/")
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._answered = False
        self._conditional = False  # whether the server has been seen to refuse a conditional write
        default = "https://s3.amazonaws.com" if scheme == "s3" else ""
        self._endpoint = os.environ.get("FIRM_S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL") or default
        self._client = _connect(self._endpoint, self._bucket, uri, TIMEOUT_S)

    @cached_property
    def _copier(self) -> Minio:
        """A client that waits for the server to copy an object, of which it says nothing before the end."""
        return _connect(self._endpoint, self._bucket, self.uri, COPY_TIMEOUT_S)

    def put(self, key: str, data: bytes | Path) -> None:
        """See `firm.storage.store.Store.put`."""
        name = self._prefix + check_key(key)

        def send() -> None:
            file = data.open("rb") if isinstance(data, Path) else io.BytesIO(data)
            with file:
                size = file.seek(0, io.SEEK_END)
                file.seek(0)
                part = max(PART_BYTES, -(-size // MAX_PARTS))
                self._client.put_object(self._bucket, name, file, size, part_size=part)

        try:
            self._call(send, key)
        except OSError as error:
            raise disk_error(error, str(data) if isinstance(data, Path) else key) from error

    def create(self, key: str, data: bytes) -> bool:
        """See `firm.storage.store.Store.create`.

        Raises:
            UserError: The server has no conditional writes; one that ignores the condition is recognised by trying.
        """
        name = self._prefix + check_key(key)

        def send() -> bool:
            try:  # the client has no public way to a condition
                self._client._put_object(self._bucket, name, data, {"If-None-Match": "*"})
            except S3Error as error:
                if error.code != "PreconditionFailed":
                    raise
                return False
            return True

        made = self._call(send, key)
        if made and not self._conditional:
            if self._call(send, key):
                raise UserError(_UNCONDITIONAL[0], f"S3 endpoint {self._endpoint}", _UNCONDITIONAL[1])
            self._conditional = True
        return made or self.get(key) == data  # made by an attempt whose answer was lost

    def copy(self, source: str, key: str) -> None:
        """Copy an object on the server."""
        origin = ComposeSource(self._bucket, self._prefix + check_key(source))
        name = self._prefix + check_key(key)
        self._call(lambda: self._copier.compose_object(self._bucket, name, [origin]), source)

    def get(self, key: str) -> bytes:
        """See `firm.storage.store.Store.get`."""
        return self._receive(key)[0]

    def look(self, key: str) -> tuple[bytes, float]:
        """The content of `key`, and how many seconds ago it was written by the server's own clock."""
        data, headers = self._receive(key)
        now, then = (parsedate_to_datetime(headers[header]) for header in ("Date", "Last-Modified"))
        return data, (now - then).total_seconds()

    def part(self, key: str, start: int, length: int) -> bytes:
        """At most `length` bytes of `key`, from the byte `start` on, which there must be."""
        return self._receive(key, start, length)[0]

    def _receive(self, key: str, start: int = 0, length: int = 0) -> tuple[bytes, Mapping[str, str]]:
        """Content, or a part of it, and headers; the length 0 stands for all."""
        name = self._prefix + check_key(key)

        def receive() -> tuple[bytes, Mapping[str, str]]:
            with _closing(self._client.get_object(self._bucket, name, offset=start, length=length)) as response:
                return response.read(), response.headers

        return self._call(receive, key)

    def fetch(self, key: str, path: Path) -> None:
        """See `firm.storage.store.Store.fetch`."""
        name = self._prefix + check_key(key)

        def receive() -> None:
            with _closing(self._client.get_object(self._bucket, name)) as response, atomic_write(path) as file:
                for block in response.stream(2**20):
                    file.write(block)

        self._call(receive, key)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """See `firm.storage.store.Store.list`."""

        def receive() -> list[tuple[str, int]]:
            objects = self._client.list_objects(self._bucket, self._prefix + prefix, recursive=True)
            found = [((o.object_name or "").removeprefix(self._prefix), o.size or 0) for o in objects]
            return sorted((key, size) for key, size in found if key and not key.endswith("/"))

        return self._call(receive, prefix)

    def exists(self, key: str) -> bool:
        """See `firm.storage.store.Store.exists`."""
        name = self._prefix + check_key(key)

        def ask() -> bool:
            try:
                self._stat(name)
            except S3Error as error:
                if error.code != "NoSuchKey":
                    raise
                return False
            return True

        return self._call(ask, key)

    def size(self, key: str) -> int:
        """Bytes of the content of `key`."""
        name = self._prefix + check_key(key)
        return self._call(lambda: self._stat(name), key)

    def _stat(self, name: str) -> int:
        try:
            return self._client.stat_object(self._bucket, name).size or 0
        except S3Error:
            # a HEAD answer has no body: bucket or keys may be wrong, for which a listing gives the right error
            next(iter(self._client.list_objects(self._bucket, name)), None)
            raise

    def delete(self, key: str) -> None:
        """See `firm.storage.store.Store.delete`."""
        name = self._prefix + check_key(key)
        self._call(lambda: self._client.remove_object(self._bucket, name), key)

    def _call(self, action: Callable[[], T], key: str) -> T:
        """Run `action` with retries on transient faults; what remains becomes a `UserError`."""

        def attempt() -> T:
            try:
                result = action()
            except MinioException:
                self._answered = True
                raise
            self._answered = True
            return result

        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=self._stop,
            wait=wait_random_exponential(multiplier=0.2, max=5),
            before_sleep=before_sleep_log(_log, logging.WARNING),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except (MinioException, HTTPError, ParseError) as error:
            full = isinstance(error, S3Error) and _FAULTS.get(error.code or "") == _FULL
            raise self._explain(error, key) from OSError(errno.ENOSPC, str(error)) if full else error

    def _stop(self, state: RetryCallState) -> bool:
        """Give up after the deadline; a long transfer that failed late still gets a second attempt."""
        elapsed = state.seconds_since_start or 0.0
        if not self._answered:
            return elapsed > FIRST_CONTACT_S
        return elapsed > DEADLINE_S and state.attempt_number > 1

    def _explain(self, error: Exception, key: str) -> UserError:
        where = f"{self.uri}/{key}".rstrip("/")
        at = f"S3 endpoint {self._endpoint}"
        if isinstance(error, SSLError):
            reason = distrust(error)
            what = f"the certificate of the S3 server is not trusted: {reason}" if reason else "no TLS connection"
            return UserError(what, at, TRUST if reason else "check http:// or https://")
        if isinstance(error, HTTPError):
            fix = "start the server, or correct FIRM_S3_ENDPOINT" if not self._answered else "run again to resume"
            return UserError(f"cannot reach S3: {_first_line(error)}", f"{at}, {where}", fix)
        if not isinstance(error, S3Error):
            return UserError(f"not an answer of an S3 server: {_first_line(error)}", at, "correct FIRM_S3_ENDPOINT")
        code = error.code or ""
        if code not in _FAULTS and error.response.status == _FORBIDDEN:
            code = "AccessDenied"
        what, fix = _FAULTS.get(code, (f"S3 failed: {error.message}", "see the log of the S3 server"))
        if code == "NoSuchBucket":
            what = f"bucket {self._bucket!r} does not exist"
        return UserError(f"{what}: {code}", f"{where}, {at}", fix)


def _connect(endpoint: str, bucket: str, uri: str, read_s: float) -> Minio:
    """Client with timeouts, `read_s` for the server's answer, and without retries of its own."""
    env = os.environ
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/"):
        fix = "set it to http://host:port or https://host:port"
        raise UserError(f"no usable S3 endpoint: {endpoint!r}", f"FIRM_S3_ENDPOINT, for {uri}", fix, usage=True)
    if "@" in parts.netloc:
        fix = "put the keys into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise UserError("the S3 endpoint must hold no user or password", f"FIRM_S3_ENDPOINT, for {uri}", fix, True)
    if missing := [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not env.get(name)]:
        fix = f"set {' and '.join(missing)} in the environment"
        raise UserError("no S3 credentials", f"{', '.join(missing)}, for {uri}", fix, usage=True)
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=TIMEOUT_S, read=read_s),
        maxsize=32,
        retries=False,
        ssl_context=tls_context("AWS_CA_BUNDLE") if parts.scheme == "https" else None,
    )
    region = env.get("AWS_REGION") or (None if parts.netloc.endswith("amazonaws.com") else "us-east-1")
    try:
        check_bucket_name(bucket)
        return Minio(
            parts.netloc,
            access_key=env["AWS_ACCESS_KEY_ID"],
            secret_key=env["AWS_SECRET_ACCESS_KEY"],
            session_token=env.get("AWS_SESSION_TOKEN"),
            secure=parts.scheme == "https",
            region=region,
            http_client=pool,
        )
    except ValueError as error:
        raise UserError(f"impossible S3 address: {error}", f"{uri} at {endpoint}", "correct it", usage=True) from error


@contextmanager
def _closing(response: BaseHTTPResponse) -> Iterator[BaseHTTPResponse]:
    """Close after a failure; a connection that was read to its end is back in the pool by then."""
    try:
        yield response
    finally:
        response.close()
        response.release_conn()


def _is_transient(error: BaseException) -> bool:
    """Faults that pass: broken connections, overload, 5xx. Never wrong credentials or a missing bucket."""
    if isinstance(error, S3Error):
        passing = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ConditionalRequestConflict")
        return error.code in passing or error.response.status in _PASSING
    if isinstance(error, ServerError):
        return error.status_code in _PASSING
    if isinstance(error, InvalidResponseError):
        return error._code in _PASSING  # no public way to the status
    return isinstance(error, HTTPError) and not isinstance(error, SSLError)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
