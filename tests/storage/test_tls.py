"""Over https: a server is believed if its certificate is good for its name, by the authorities that boto3 is told of; else not at all."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import bottomless_wal
from bottomless_wal import admin
from bottomless_wal.core.errors import StoreError
from bottomless_wal.storage import open_store
from tests.support.endpoints import Endpoint, MakeConfig
from tests.support.faultproxy import Fault, FaultProxy

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """Signs certificates; `bundle` is what a client has to know to believe them."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    directory: Path

    @property
    def bundle(self) -> str:
        return str(self.directory / "authority.pem")

    def signed(self, *names: str, over: bool = False) -> ssl.SSLContext:
        """What a server of these names presents; `over`: the certificate has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        hosts = [x509.DNSName(name) if name[0].isalpha() else x509.IPAddress(ipaddress.ip_address(name)) for name in names]
        built = _certificate(names[0], key, self.certificate.subject, over=over).add_extension(
            x509.SubjectAlternativeName(hosts), critical=False
        )
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        certificate = built.add_extension(issuer, critical=False).sign(self.key, hashes.SHA256())
        chain, private = self.directory / f"{names[0]}.pem", self.directory / f"{names[0]}.key"
        chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, private)
        return context


def _certificate(name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name | None, *, over: bool = False) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject).public_key(key.public_key())
    built = built.serial_number(x509.random_serial_number()).not_valid_before(now - 9 * DAY)
    return built.not_valid_after(now - DAY if over else now + 9 * DAY)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One that no system knows."""
    key = ec.generate_private_key(ec.SECP256R1())
    built = _certificate("nobody's authority", key, None).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = built.add_extension(identifier, critical=False).add_extension(usage, critical=True).sign(key, hashes.SHA256())
    made = Authority(key, certificate, tmp_path_factory.mktemp("authority"))
    Path(made.bundle).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return made


@dataclass
class Front:
    """Speaks TLS to the client and hands everything, as it is, to the plain server behind it. Counts the handshakes that were begun."""

    context: ssl.SSLContext
    upstream: str
    begun: int = 0
    _open: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        parts = urllib.parse.urlsplit(self.upstream)
        self._target = (parts.hostname or "", parts.port or 80)

    def url(self, host: str = "localhost") -> str:
        return f"https://{host}:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Front]:
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            for one in (self._listener, *self._open):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            self.begun += 1
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        # An OSError: the client does not believe us, has gone, or the test is over.
        with contextlib.suppress(OSError), plain, self.context.wrap_socket(plain, server_side=True) as client:
            with socket.create_connection(self._target) as server:
                self._open += [client, server]
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def refusal(front: Front, make_config: MakeConfig, place: Endpoint, *, host: str = "localhost") -> StoreError:
    """The error that asking the server gives: at once, although there is time for retries."""
    config = make_config(Endpoint("s3", front.url(host), place.bucket, {}), retry_timeout=3.0)
    store = open_store(config)
    with pytest.raises(StoreError) as raised:
        store.get("key", limit=10)
    store.close()
    assert front.begun == 1, "it was tried again"
    return raised.value


def test_a_database_is_replicated_over_https_with_an_authority_of_ones_own(
    rclone_endpoint: Endpoint, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with Front(authority.signed("localhost"), rclone_endpoint.url).running() as front:
        options = {"endpoint": front.url(), "bucket": rclone_endpoint.bucket, "create_bucket": True}
        con = bottomless_wal.connect(tmp_path / "app.db", **options)
        con.execute("CREATE TABLE t(x); INSERT INTO t VALUES('over TLS')")
        con.close()
        bottomless_wal.restore(tmp_path / "app.db", output=tmp_path / "copy.db", **options)
        assert (tmp_path / "copy.db").read_bytes() == (tmp_path / "app.db").read_bytes()
        assert [check.name for check in admin.diagnose(**options) if check.state == "failed"] == []
        assert front.begun


def test_an_unknown_authority_is_refused_at_once_and_the_hint_names_the_setting(
    moto_endpoint: Endpoint, authority: Authority, make_config: MakeConfig
) -> None:
    with Front(authority.signed("localhost"), moto_endpoint.url).running() as front:
        error = refusal(front, make_config, moto_endpoint)
    assert "certificate" in error.message
    assert "AWS_CA_BUNDLE" in error.hint


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_a_bundle_without_a_name_is_none_and_not_every_authority(
    moto_endpoint: Endpoint, authority: Authority, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "")
    with Front(authority.signed("localhost"), moto_endpoint.url).running() as front:
        assert "certificate" in refusal(front, make_config, moto_endpoint).message


@pytest.mark.parametrize(("names", "host"), [(("elsewhere.example",), "localhost"), (("localhost",), "127.0.0.1")])
def test_a_certificate_of_another_name_is_refused(
    moto_endpoint: Endpoint,
    authority: Authority,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    host: str,
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with Front(authority.signed(*names), moto_endpoint.url).running() as front:
        error = refusal(front, make_config, moto_endpoint, host=host)
    assert "match" in error.message
    assert host in error.message
    assert "host" in error.hint


def test_a_certificate_that_is_over_is_refused(
    moto_endpoint: Endpoint, authority: Authority, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with Front(authority.signed("localhost", over=True), moto_endpoint.url).running() as front:
        assert "expired" in refusal(front, make_config, moto_endpoint).message


@pytest.mark.parametrize("content", [None, "this is no certificate"])
def test_a_bundle_that_cannot_be_used_is_said_at_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    bundle = tmp_path / "bundle.pem"
    if content is not None:
        bundle.write_text(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = Endpoint("s3", f"https://127.0.0.1:{server.getsockname()[1]}", "bucket", {})
        store = open_store(make_config(place, retry_timeout=3.0))
        with pytest.raises(StoreError) as raised:
            store.get("key", limit=10)
        store.close()
    assert "AWS_CA_BUNDLE" in raised.value.hint
    assert "given up" not in raised.value.message


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_redirect_is_not_followed_out_of_tls_nor_into_it(
    moto_endpoint: Endpoint, authority: Authority, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, status: int, scheme: str
) -> None:
    """What is redirected would be a signed request, and data."""
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with FaultProxy(moto_endpoint.url) as elsewhere, FaultProxy(moto_endpoint.url) as proxy:
        with Front(authority.signed("localhost"), proxy.url).running() as front:
            target = elsewhere.url if scheme == "https" else front.url()
            answer = f"HTTP/1.1 {status} Moved\r\nLocation: {target}/bucket/key\r\nContent-Length: 0\r\n\r\n".encode()
            proxy.script(Fault(instead=answer, times=9))
            begins_at = front.url() if scheme == "https" else proxy.url
            store = open_store(make_config(Endpoint("s3", begins_at, "bucket", {}), retry_timeout=0))
            for request in (lambda: store.get("key", limit=10), lambda: store.put("key", b"data"), lambda: list(store.list(""))):
                with pytest.raises(StoreError, match=str(status)):
                    request()
            store.close()
            assert elsewhere.requests == []
            assert front.begun == (scheme == "https")


def test_a_server_that_speaks_no_tls_is_told_nothing(make_config: MakeConfig) -> None:
    heard: list[bytes] = []

    def serve(server: socket.socket) -> None:
        with server.accept()[0] as client:
            heard.append(client.recv(1 << 16))
            client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        place = Endpoint("s3", f"https://127.0.0.1:{server.getsockname()[1]}", "bucket", {})
        store = open_store(make_config(place, retry_timeout=0))
        with pytest.raises(StoreError):
            store.put("key", b"the data")
        store.close()
        thread.join()
    assert b"the data" not in heard[0]
    assert b"PUT" not in heard[0]
