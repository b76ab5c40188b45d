"""A private certificate authority: S3 and endpoints behind TLS, with the real clients."""

import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from authority import Authority, moto
from integration.conftest import BUCKET, environment
from shared import HTTPRequest

from firm.chat.client import EndpointClient
from firm.chat.messages import user_message
from firm.config import EndpointChat
from firm.records import UserError
from firm.storage.open import open_store

TRUSTED = ("FIRM_CA_BUNDLE", "AWS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def s3_address(authority: Authority) -> Iterator[str]:
    with moto(authority, BUCKET) as address:
        yield address


def answer(request: HTTPRequest) -> None:
    request.reply(200, json.dumps({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}).encode())


@pytest.fixture(scope="module", params=["IP:127.0.0.1"])
def endpoint(request: pytest.FixtureRequest, authority: Authority) -> Iterator[str]:
    """A chat endpoint with a certificate of the authority, for this machine or as the test says."""
    certificate = authority.certificate(request.param)

    class Handler(HTTPRequest):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.file, certificate.key)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"https://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in (*TRUSTED, "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in environment(s3_address).items():
        monkeypatch.setenv(name, value.replace("http://", "https://"))
    return f"s3://{BUCKET}/tls"


def ask(url: str) -> str:
    client = EndpointClient(EndpointChat(base_url=url, model="m", deadline_s=20), first_wait_s=0.01)
    try:
        return client.complete([user_message("?")], max_tokens=5, temperature=0, seed=None).text
    finally:
        client.close()


def refused(caught: pytest.ExceptionInfo[UserError], reason: str) -> None:
    assert reason in caught.value.what and "FIRM_CA_BUNDLE" in caught.value.fix


@pytest.mark.parametrize("variable", ["FIRM_CA_BUNDLE", "AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_store_behind_a_private_authority(
    store: str, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        open_store(store).put("a", b"1")
    refused(caught, "unable to get local issuer certificate")
    assert "https://127.0.0.1" in caught.value.where and time.monotonic() - start < 5, "it must not be retried"

    monkeypatch.setenv(variable, str(authority.file))
    opened = open_store(store)
    big = tmp_path / "big"
    big.write_bytes(bytes(9 * 2**20))  # in parts
    opened.put(f"{variable}/big", big)
    opened.copy(f"{variable}/big", f"{variable}/copy")
    assert opened.create(f"{variable}/claim", b"1") and not opened.create(f"{variable}/claim", b"2")
    assert [key for key, _ in opened.list(variable)] == [f"{variable}/{key}" for key in ("big", "claim", "copy")]


@pytest.mark.parametrize("variable", ["FIRM_CA_BUNDLE", "SSL_CERT_FILE"])
def test_an_endpoint_behind_a_private_authority(
    endpoint: str, authority: Authority, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        ask(endpoint)
    refused(caught, "unable to get local issuer certificate")
    assert caught.value.where.startswith(endpoint) and time.monotonic() - start < 5, "it must not be retried"
    monkeypatch.setenv(variable, str(authority.file))
    assert ask(endpoint) == "yes"


@pytest.mark.parametrize("endpoint", ["DNS:example.com"], indirect=True)
def test_the_name_is_checked_as_well(endpoint: str, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRM_CA_BUNDLE", str(authority.file))
    with pytest.raises(UserError) as caught:
        ask(endpoint)
    refused(caught, "certificate is not valid for '127.0.0.1'")


@pytest.mark.parametrize("variable", ["FIRM_CA_BUNDLE", "AWS_CA_BUNDLE", "SSL_CERT_FILE"])
@pytest.mark.parametrize(
    ("content", "what"), [(None, "cannot be read: No such file"), (b"", "holds no cert"), (b"\xff{}", "holds no cert")]
)
def test_a_useless_file_is_named(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, content: bytes | None, what: str
) -> None:
    file = tmp_path / "bundle.pem"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv(variable, str(file))
    with pytest.raises(UserError, match=what) as caught:
        open_store(store)
    assert caught.value.usage and str(file) in caught.value.where and variable in caught.value.where


def test_public_authorities_stay_trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    from firm.certificates import tls_context

    public = tls_context().cert_store_stats()["x509_ca"]
    monkeypatch.setenv("FIRM_CA_BUNDLE", str(authority.file))
    assert public > 50 and tls_context().cert_store_stats()["x509_ca"] == public + 1
