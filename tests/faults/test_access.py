"""Nobody comes in who should not, on a real server with TLS, certificates and tokens."""

from __future__ import annotations

import datetime
import ipaddress
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import jwt
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from likely import AdminClient, AsyncClient, Client
from likely.client import credentials
from likely.client.channels import Route
from likely.errors import AccessDenied, SettingsError, Unauthenticated, Unavailable
from likely.v1.generation_pb2_grpc import GenerationServiceStub
from likely.v1.scoring_pb2 import ScoreRequest
from likely.v1.scoring_pb2_grpc import ScoringServiceStub
from tests.faults.alive import SECONDS, comes_to_rest, drawing, on_toy, refused, scrape

if TYPE_CHECKING:
    from tests.conftest import Live, Running

PEM = serialization.Encoding.PEM
X = np.zeros((1, 3, 3), np.uint8)
SECRET, STRONGER = "correct-horse-battery", "staple-of-the-house"
HOUR = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Authority:
    """Signs certificates into a folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    name: x509.Name

    @classmethod
    def made(cls, folder: Path, name: str) -> Authority:
        folder.mkdir(exist_ok=True)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        authority = cls(folder, ec.generate_private_key(ec.SECP256R1()), subject)
        authority.sign("ca", authority.key, subject, ca=True)
        return authority

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    def issue(
        self, file: str, *, ends: datetime.timedelta = HOUR, name: str = "", host: str = ""
    ) -> Path:
        """A certificate for 127.0.0.1, or that host alone, its key beside it as .key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name or file)])
        return self.sign(file, key, subject, ca=False, ends=ends, host=host)

    def sign(
        self,
        file: str,
        key: Any,
        subject: x509.Name,
        *,
        ca: bool,
        ends: datetime.timedelta = HOUR,
        host: str = "",
    ) -> Path:
        now = datetime.datetime.now(datetime.UTC)
        local = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        here = x509.SubjectAlternativeName([x509.DNSName(host) if host else local])
        made = (
            x509.CertificateBuilder(self.name, subject, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * HOUR)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(here, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        path = self.folder / f"{file}.crt"
        secret = key.private_bytes(
            PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.with_suffix(".key").write_bytes(secret)
        path.write_bytes(made.public_bytes(PEM))
        return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("tls"), "the house")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("tls"), "a stranger")


@pytest.fixture(scope="module")
def issuer() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def guarded(
    running: Running, authority: Authority, issuer: Any, tmp_path_factory: Any
) -> Iterator[Live]:
    """A server with TLS, both kinds of tokens, and open health."""
    folder = tmp_path_factory.mktemp("access")
    certificate = authority.issue("server")
    (folder / "tokens.toml").write_text(
        f'[[token]]\nname = "reader"\nscopes = ["score"]\nsecret = "{SECRET}"\n'
        f'[[token]]\nname = "maker"\nscopes = ["score", "generate"]\nsecret = "{STRONGER}"\n'
    )
    algorithm = jwt.get_algorithm_by_name("ES256")
    key = {**json.loads(algorithm.to_jwk(issuer.public_key())), "kid": "k"}
    (folder / "jwks.json").write_text(json.dumps({"keys": [key]}))
    with running(
        tls_certificate=certificate,
        tls_key=certificate.with_suffix(".key"),
        tokens=folder / "tokens.toml",
        jwt_keys=folder / "jwks.json",
        jwt_issuer="https://issuer",
        jwt_audience="likely",
        jwt_leeway=0,
    ) as live:
        yield live


def signed(issuer: Any, **claims: Any) -> str:
    defaults = {"iss": "https://issuer", "aud": "likely", "sub": "robot", "scope": "score"}
    ends = {"exp": int(time.time()) + 60}
    return jwt.encode({**defaults, **ends, **claims}, issuer, "ES256", headers={"kid": "k"})


def asks(live: Live, authority: Authority, token: str | None, **shown: Any) -> Any:
    """Score, over TLS, with that token."""
    route = Route(live.address, ca=authority.ca, token=token, **shown)
    with route.channel() as channel:
        scoring = ScoringServiceStub(channel)
        return scoring.Score(on_toy(ScoreRequest), timeout=SECONDS, metadata=route.metadata())


def does_not_connect(channel: grpc.Channel) -> None:
    """Returns if a good request over this channel does not come through."""
    scoring = ScoringServiceStub(channel)
    request = on_toy(ScoreRequest)
    refused(lambda: scoring.Score(request, timeout=SECONDS), grpc.StatusCode.UNAVAILABLE)


def well(live: Live, authority: Authority, token: str | None = SECRET, **shown: Any) -> None:
    """Health says SERVING without a token; a good request with one is answered; all at rest."""
    with Route(live.address, ca=authority.ca, **shown).channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        check = health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert check.status == health_pb2.HealthCheckResponse.SERVING
    assert len(asks(live, authority, token, **shown).scores) == 1
    comes_to_rest(live)


@pytest.mark.fault(38)
def test_tokens_let_in_whom_they_should(guarded: Live, authority: Authority, issuer: Any) -> None:
    for token in (SECRET, STRONGER, signed(issuer)):
        assert len(asks(guarded, authority, token).scores) == 1
    holders = [json.loads(line).get("holder") for line in guarded.log.getvalue().splitlines()]
    assert {"reader", "maker", "robot"} <= set(holders)
    assert SECRET not in guarded.log.getvalue()
    well(guarded, authority)


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("none", "TOKEN_MISSING"),
        ("wrong", "TOKEN_INVALID"),
        ("expired", "TOKEN_EXPIRED"),
        ("audience", "TOKEN_INVALID"),
        ("issuer", "TOKEN_INVALID"),
        ("alg=none", "TOKEN_INVALID"),
        ("another key", "TOKEN_INVALID"),
    ],
)
def test_a_token_that_is_none_is_unauthenticated(
    guarded: Live, authority: Authority, issuer: Any, wrong: str, reason: str
) -> None:
    unsigned = {"sub": "robot", "exp": int(time.time()) + 60}
    token = {
        "none": None,
        "wrong": "wrong-horse-battery",
        "expired": signed(issuer, exp=int(time.time()) - 1),
        "audience": signed(issuer, aud="another"),
        "issuer": signed(issuer, iss="https://another"),
        "alg=none": jwt.encode(unsigned, "", "none", headers={"kid": "k"}),
        "another key": signed(ec.generate_private_key(ec.SECP256R1())),
    }[wrong]
    failure = refused(
        lambda: asks(guarded, authority, token), grpc.StatusCode.UNAUTHENTICATED, reason
    )
    assert "horse" not in failure.details()
    well(guarded, authority)


@pytest.mark.fault(38)
def test_a_token_without_the_scope_is_denied(
    guarded: Live, authority: Authority, issuer: Any
) -> None:
    for token in (SECRET, signed(issuer)):
        route = Route(guarded.address, ca=authority.ca, token=token)
        with route.channel() as channel:
            call: Any = GenerationServiceStub(channel).Generate
            failure = refused(
                lambda: list(call(drawing(), timeout=SECONDS, metadata=route.metadata())),  # noqa: B023
                grpc.StatusCode.PERMISSION_DENIED,
                "SCOPE_MISSING",
            )
        assert "lacks the scope generate" in failure.details()
    with Client(guarded.address, ca=authority.ca, token=STRONGER) as client:
        assert len(client.generate(3).images) == 3
    well(guarded, authority)


@pytest.mark.fault(38)
def test_reflection_and_unknown_methods_ask_for_a_token(
    guarded: Live, authority: Authority
) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    route = Route(guarded.address, ca=authority.ca, token=SECRET)
    with route.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        unknown: Any = channel.unary_unary("/likely.v1.ScoringService/Guess")
        for ask in (
            lambda: list(stub.ServerReflectionInfo(iter([request]), timeout=SECONDS)),
            lambda: unknown(b"", timeout=SECONDS),
        ):
            refused(ask, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
        answers = stub.ServerReflectionInfo(
            iter([request]), timeout=SECONDS, metadata=route.metadata()
        )
        assert len(list(answers)) == 1
    well(guarded, authority)


@pytest.mark.fault(38)
def test_plaintext_to_tls_and_a_wrong_authority_do_not_connect(
    guarded: Live, authority: Authority, stranger: Authority
) -> None:
    for channel in (
        grpc.insecure_channel(guarded.address),
        Route(guarded.address, ca=stranger.ca).channel(once=True),
        Route(guarded.address, tls=True).channel(once=True),
    ):
        with channel:
            does_not_connect(channel)
    well(guarded, authority)


@pytest.mark.fault(38)
def test_an_expired_certificate_does_not_connect(running: Running, authority: Authority) -> None:
    late = authority.issue("late", ends=-HOUR)
    with (
        running(tls_certificate=late, tls_key=late.with_suffix(".key")) as live,
        Route(live.address, ca=authority.ca).channel(once=True) as channel,
    ):
        does_not_connect(channel)
        comes_to_rest(live)  # more cannot be asked: to our clients it is no server
        assert scrape(live)["likely_ready"] == 1


@pytest.mark.fault(38)
def test_clients_show_a_certificate_where_it_is_asked(
    running: Running, authority: Authority, stranger: Authority
) -> None:
    server, mine = authority.issue("mutual"), authority.issue("client")
    foreign, late = stranger.issue("client"), authority.issue("late-client", ends=-HOUR)
    with running(
        tls_certificate=server, tls_key=server.with_suffix(".key"), tls_client_ca=authority.ca
    ) as live:
        for shown in (None, foreign, late):
            key = shown and shown.with_suffix(".key")
            route = Route(live.address, ca=authority.ca, certificate=shown, key=key)
            with route.channel(once=True) as channel:
                does_not_connect(channel)
        key = mine.with_suffix(".key")
        with Client(live.address, ca=authority.ca, certificate=mine, key=key) as client:
            assert len(client.score(X).log_px) == 1
        well(live, authority, None, certificate=mine, key=key)


@pytest.mark.fault(38)
def test_a_certificate_may_bear_a_name_that_is_not_the_address(
    running: Running, authority: Authority
) -> None:
    from click.testing import CliRunner

    from likely.cli import main

    certificate, name = authority.issue("named", host="likely.prod.svc"), "likely.prod.svc"
    shown: dict[str, Any] = {
        "tls_certificate": certificate,
        "tls_key": certificate.with_suffix(".key"),
    }

    async def asked(address: str | list[str]) -> int:
        async with AsyncClient(address, ca=authority.ca, server_name=name) as client:
            return len((await client.score(X)).log_px)

    with running(**shown) as live, running(**shown) as other:
        both = [live.address, other.address]
        for address in (live.address, both, f"ipv4:{','.join(both)}"):
            with Client(address, ca=authority.ca, server_name=name) as client:
                assert len(client.score(X).log_px) == 1
            assert live.run(asked(address)) == 1
            for wrong in ("likely.test.svc", None):
                if wrong is None and address != live.address:
                    with pytest.raises(SettingsError, match="server_name="):
                        Client(address, ca=authority.ca)
                else:
                    route = Route(address, ca=authority.ca, server_name=wrong)
                    with route.channel(once=True) as channel:
                        does_not_connect(channel)
        there = {"LIKELY_ADDRESS": live.address, "LIKELY_CA": str(authority.ca)}
        run = CliRunner().invoke
        assert run(main, ["health"], env={**there, "LIKELY_SERVER_NAME": name}).exit_code == 0
        assert run(main, ["health"], env=there).exit_code == 1
        well(live, authority, None, server_name=name)


@pytest.mark.fault(38)
def test_a_clients_file_that_could_not_be_read_once_is_read_later(
    authority: Authority, stranger: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "CHECK_INTERVAL", 0.0)
    ca = tmp_path / "ca.crt"
    ca.write_bytes(stranger.ca.read_bytes())
    held = credentials.Credentials(ca, None, None)
    before = held.edition()
    ca.write_bytes(authority.ca.read_bytes() + b"\n")

    def hindered(path: Path) -> bytes:
        raise OSError(f"{path}: too many open files")

    with monkeypatch.context() as hindrance:
        hindrance.setattr(Path, "read_bytes", hindered)
        assert held.edition() == before
    assert held.edition() == before + 1


@pytest.mark.fault(38)
def test_a_client_shows_and_believes_what_its_files_hold_now(
    running: Running,
    authority: Authority,
    stranger: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(credentials, "CHECK_INTERVAL", 0.0)
    certificate, key, ca = (tmp_path / name for name in ("tls.crt", "tls.key", "ca.crt"))
    old, new, newer = stranger.issue("old"), authority.issue("new"), authority.issue("newer")

    def exchange(issued: Path) -> None:
        key.write_bytes(issued.with_suffix(".key").read_bytes())
        certificate.write_bytes(issued.read_bytes())

    def shown(client: Callable[..., Any], address: str, **more: Any) -> Any:
        return client(address, ca=ca, certificate=certificate, key=key, **more)

    async def goes_on() -> None:
        ca.write_bytes(stranger.ca.read_bytes())
        exchange(old)
        async with shown(AsyncClient, live.address, retries=False) as client:
            with pytest.raises(Unavailable):
                await client.score(X)
            ca.write_bytes(authority.ca.read_bytes())
            exchange(new)
            stream = client.generate_stream(50, seed=1)
            first = await anext(stream)
            exchange(newer)
            assert len((await client.score(X)).log_px) == 1
            rest = [len(chunk.images) async for chunk in stream]
            assert len(first.images) + sum(rest) == 50

    server = authority.issue("rotating")
    with running(
        tls_certificate=server,
        tls_key=server.with_suffix(".key"),
        tls_client_ca=authority.ca,
        admin_port=0,
    ) as live:
        ca.write_bytes(stranger.ca.read_bytes())
        exchange(old)
        with (
            shown(Client, live.address, retries=False) as client,
            shown(AdminClient, f"127.0.0.1:{live.server.admin_port}") as admin,
        ):
            for ask in (admin.versions, client.models):
                with pytest.raises(Unavailable):
                    ask()
            ca.write_bytes(authority.ca.read_bytes())
            exchange(new)
            assert len(admin.versions()) == len(client.models()) == 1
            stream = client.generate_stream(50, seed=1)
            first = next(stream)
            key.unlink()  # half an exchange is none
            channel = client._rpcs._channel
            assert len(client.score(X).log_px) == 1
            key.write_bytes(newer.with_suffix(".key").read_bytes())
            assert len(client.score(X).log_px) == 1
            assert client._rpcs._channel is channel
            exchange(newer)
            assert len(client.score(X).log_px) == 1
            assert client._rpcs._channel is not channel
            del channel
            assert len(first.images) + sum(len(chunk.images) for chunk in stream) == 50
        live.run(goes_on())
        mine = new.with_suffix(".key")
        well(live, authority, None, certificate=new, key=mine)


def serial(live: Live, authority: Authority) -> int:
    """The number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.set_alpn_protocols(["h2"])
    host, _, port = live.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host) as there,
    ):
        data = there.getpeercert(binary_form=True)
    assert data is not None
    return x509.load_der_x509_certificate(data).serial_number


@pytest.mark.fault(38)
def test_a_certificate_is_exchanged_while_serving(running: Running, authority: Authority) -> None:
    certificate = authority.issue("rotated")
    key = certificate.with_suffix(".key")
    with (
        running(tls_certificate=certificate, tls_key=key) as live,
        Client(live.address, ca=authority.ca) as before,
    ):
        assert len(before.score(X).log_px) == 1
        first = serial(live, authority)
        other = authority.issue("other")
        key.write_bytes(other.with_suffix(".key").read_bytes())  # half an exchange is none
        time.sleep(1.2)
        assert serial(live, authority) == first
        certificate.write_bytes(other.read_bytes())
        end = time.monotonic() + SECONDS
        while serial(live, authority) == first:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert len(before.score(X).log_px) == 1  # what is connected stays so
        with Client(live.address, ca=authority.ca) as after:
            assert len(after.score(X).log_px) == 1
        events = [json.loads(line)["event"] for line in live.log.getvalue().splitlines()]
        assert events.count("not reloaded") == 1
        assert events.count("reloaded") == 1
        well(live, authority, None)


@pytest.mark.fault(38)
def test_our_clients_do_not_say_that_nobody_is_there_where_tls_fails(
    guarded: Live, running: Running, authority: Authority, stranger: Authority
) -> None:
    with running() as plain:
        failed = "is TLS on one side only"
        for address, given, sentence in (
            (guarded.address, {}, r"\(or one asks for TLS\); `likely serve` starts one"),
            (guarded.address, {"ca": stranger.ca}, failed),
            (guarded.address, {"ca": authority.ca, "server_name": "elsewhere"}, failed),
            (plain.address, {"ca": authority.ca}, failed),
        ):
            with Client(address, retries=False, **given) as client:
                with pytest.raises(Unavailable, match=sentence) as caught:
                    client.models()
                assert ("starts one" in str(caught.value)) is (sentence != failed)


@pytest.mark.fault(38)
def test_our_clients_tell_what_was_denied(guarded: Live, authority: Authority) -> None:
    with Client(guarded.address, ca=authority.ca) as client:
        with pytest.raises(Unauthenticated) as missing:
            client.score(X)
        assert missing.value.reason == "TOKEN_MISSING"
    given = iter(["wrong-horse-battery", SECRET, SECRET, SECRET])
    with Client(guarded.address, ca=authority.ca, token=lambda: next(given)) as client:
        with pytest.raises(Unauthenticated):
            client.score(X)
        assert len(client.score(X).log_px) == 1  # a token is asked for anew each time
    with (
        Client(guarded.address, ca=authority.ca, token=SECRET) as client,
        pytest.raises(AccessDenied, match="scope generate") as denied,
    ):
        client.generate(1)
    assert not isinstance(denied.value, Unauthenticated)

    async def asked() -> int:
        async with AsyncClient(guarded.address, ca=authority.ca, token=SECRET) as client:
            return len((await client.score(X)).log_px)

    assert guarded.run(asked()) == 1
    well(guarded, authority)


@pytest.mark.fault(38)
def test_no_token_goes_out_unencrypted(tmp_path: Path) -> None:
    for address in ("example.org:1", "10.0.0.1:1"):
        with pytest.raises(SettingsError, match="unencrypted"):
            Client(address, token=SECRET)
        Client(address, token=SECRET, plaintext_token=True).close()
    with pytest.raises(SettingsError, match="together"):
        Client(certificate=tmp_path / "x")
    with pytest.raises(SettingsError, match="cannot be read"):
        Client(ca=tmp_path / "x")
    Client("127.0.0.1:1", token=SECRET).close()
    Client("example.org:1", token=SECRET, tls=True).close()


@pytest.mark.fault(38)
def test_the_command_line_may_show_a_token_unencrypted() -> None:
    from click.testing import CliRunner

    from likely.cli import main

    asked = ["--address", "0.0.0.0:1", "--token", SECRET, "--timeout", "0.1"]
    for command in (["models"], ["admin", "versions"]):
        kept = CliRunner().invoke(main, [*command, *asked])
        assert "a token would go unencrypted" in kept.stderr
        shown = CliRunner().invoke(main, [*command, *asked, "--plaintext-token"])
        assert shown.exit_code == 1
        assert "unencrypted" not in shown.stderr


@pytest.mark.fault(38)
def test_the_command_line_shows_a_token_and_asks_for_health_without(
    guarded: Live, authority: Authority, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from likely.cli import main

    np.save(tmp_path / "x.npy", X)
    there = ["--address", guarded.address, "--ca", str(authority.ca)]
    run = CliRunner().invoke
    good = run(main, ["score", str(tmp_path / "x.npy"), *there], env={"LIKELY_TOKEN": SECRET})
    assert good.exit_code == 0, good.output
    bad = run(main, ["score", str(tmp_path / "x.npy"), *there])
    assert bad.exit_code == 1
    assert "bearer token" in bad.stderr
    assert run(main, ["health", *there]).stdout == "SERVING\n"
    well(guarded, authority)
