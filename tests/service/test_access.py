"""Tokens let in whom they should, for what they should, for as long as they should."""

from __future__ import annotations

import hashlib
import io
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from likely import logs
from likely.errors import AccessDenied, SettingsError, Unauthenticated
from likely.serving import access
from likely.serving.access import LARGEST_FILE, UNKNOWN, Gate, Holder, Issuer, Scope, Secrets, gate
from likely.settings import load

LOG = logs.logger("debug", "json", io.StringIO())
SCORING = "likely.v1.ScoringService"
ADMIN = "likely.v1.AdminService"
TOKENS = f"""
[[token]]
name = "pipeline"
scopes = ["score"]
secret = "correct-horse-battery"

[[token]]
name = "operator"
scopes = ["score", "generate", "admin"]
sha256 = "{hashlib.sha256(b"staple-of-the-house").hexdigest()}"
"""


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(TOKENS)
    return path


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {token}")]


def refused(gate: Gate, metadata: Any, service: str = SCORING) -> str:
    with pytest.raises(AccessDenied) as caught:
        gate.admit(service, metadata)
    error = caught.value
    return error.reason if isinstance(error, Unauthenticated) else "SCOPE_MISSING"


def test_without_tokens_everybody_comes_in() -> None:
    for service in (SCORING, ADMIN, "grpc.health.v1.Health"):
        assert Gate().admit(service, []) is None


def test_secrets_and_their_digests_are_known(tokens: Path) -> None:
    known = Gate(Secrets(tokens, LOG))
    pipeline = known.admit(SCORING, bearer("correct-horse-battery"))
    assert pipeline == Holder("pipeline", frozenset({Scope.SCORE}), "pipeline")
    operator = known.admit(SCORING, bearer("staple-of-the-house"))
    assert operator is not None
    assert operator.name == "operator"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([], "TOKEN_MISSING"),
        ([("authorization", "")], "TOKEN_INVALID"),
        ([("authorization", "Bearer")], "TOKEN_INVALID"),
        ([("authorization", "Bearer ")], "TOKEN_INVALID"),
        ([("authorization", "correct-horse-battery")], "TOKEN_INVALID"),
        ([("authorization", "Basic correct-horse-battery")], "TOKEN_INVALID"),
        (bearer("correct-horse-battery2"), "TOKEN_INVALID"),
        (bearer("correct-horse-battery") * 2, "TOKEN_INVALID"),
        (bearer(hashlib.sha256(b"correct-horse-battery").hexdigest()), "TOKEN_INVALID"),
    ],
)
def test_no_valid_token_says_so(tokens: Path, metadata: Any, reason: str) -> None:
    assert refused(Gate(Secrets(tokens, LOG)), metadata) == reason


def test_scopes_are_those_of_the_service(tokens: Path) -> None:
    known, mine = Gate(Secrets(tokens, LOG)), bearer("correct-horse-battery")
    for service in (SCORING, "likely.v1.ModelService"):
        assert known.admit(service, mine)
    for service in (
        "likely.v1.GenerationService",
        "likely.v1.LatentService",
        ADMIN,
        "some.other.Service",
    ):
        assert refused(known, mine, service) == "SCOPE_MISSING"
        assert known.admit(service, bearer("staple-of-the-house"))
    assert known.admit(UNKNOWN, mine)  # who asks for what there is not is told so
    assert refused(known, [], UNKNOWN) == "TOKEN_MISSING"
    assert known.admit("grpc.health.v1.Health", []) is None
    assert refused(known, [], "grpc.reflection.v1alpha.ServerReflection") == "TOKEN_MISSING"


def test_a_changed_file_counts_and_a_broken_one_does_not(tokens: Path) -> None:
    out = io.StringIO()
    known = Gate(Secrets(tokens, logs.logger("debug", "json", out), interval=0))
    old, new = bearer("correct-horse-battery"), bearer("one-more-horse-battery")
    assert known.admit(SCORING, old)
    # Of another length: a clock may stand still between two writes.
    tokens.write_text(TOKENS.replace("correct", "one-more"))
    assert refused(known, old) == "TOKEN_INVALID"
    assert known.admit(SCORING, new)
    for broken in ("[[token", "", "\0"):
        tokens.write_text(broken)
        assert known.admit(SCORING, new)
    tokens.unlink()
    assert known.admit(SCORING, new)
    assert known.admit(SCORING, new)
    events = [json.loads(line)["event"] for line in out.getvalue().splitlines()]
    assert events == ["reloaded"] + ["not reloaded"] * 4
    assert "horse" not in out.getvalue()


def test_all_tokens_may_be_withdrawn(tokens: Path) -> None:
    known = Gate(Secrets(tokens, LOG, interval=0))
    assert known.admit(SCORING, bearer("correct-horse-battery"))
    tokens.write_text("token = []")
    for each in (known, Gate(Secrets(tokens, LOG))):  # workers begin anew, too
        assert refused(each, bearer("correct-horse-battery")) == "TOKEN_INVALID"
        assert not each.is_open


def test_all_keys_may_be_withdrawn(tmp_path: Path) -> None:
    path = jwks(tmp_path / "jwks.json", "ES256")
    known = issuing(path, interval=0)
    assert known.admit(SCORING, bearer(signed()))
    for broken in ("{}", '{"keys": 1}', '{"keys": {}}', '{"keys": ""}'):
        path.write_text(broken)
        assert known.admit(SCORING, bearer(signed()))
    path.write_text('{"keys": []}')
    for each in (known, issuing(path)):
        assert refused(each, bearer(signed())) == "TOKEN_INVALID"
        assert not each.is_open


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "token: Field required"),
        ('[[token]]\nname = "a"\nscopes = []', "exactly one of secret and sha256"),
        (TOKENS.replace("correct-horse-battery", "short"), "secret"),
        (TOKENS.replace('"score"]', '"everything"]'), "'score', 'generate' or 'admin'"),
        (TOKENS.replace("operator", "pipeline"), "two tokens one name"),
        (TOKENS.replace("correct-horse-battery", "staple-of-the-house"), "two tokens one secret"),
        ("a = " + "[" * 20_000, "not TOML"),
        ("\xff", "not TOML"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SettingsError, match=sentence) as caught:
        Secrets(path, LOG)
    assert "horse" not in str(caught.value)


KEYS: dict[str, Any] = {
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
}


def jwks(path: Path, *algorithms: str, **more: Any) -> Path:
    keys = []
    for algorithm in algorithms:
        public = KEYS[algorithm].public_key()
        made = jwt.get_algorithm_by_name(algorithm).to_jwk(public, as_dict=True)
        keys.append({**made, "kid": algorithm, **more})
    path.write_text(json.dumps({"keys": keys}))
    return path


def signed(algorithm: str = "ES256", key: Any = None, kid: Any = None, **claims: Any) -> str:
    payload = {
        "iss": "https://issuer",
        "aud": "likely",
        "sub": "robot@example",
        "exp": int(time.time()) + 60,
        "scope": "openid score",
        **claims,
    }
    payload = {name: value for name, value in payload.items() if value is not None}
    headers = {"kid": algorithm if kid is None else kid}
    return jwt.encode(payload, key or KEYS[algorithm], algorithm, headers=headers)


def issuing(path: Path, **more: Any) -> Gate:
    options: dict[str, Any] = {
        "name": "https://issuer",
        "audience": "likely",
        "algorithms": tuple(KEYS),
        "interval": 0,
    }
    return Gate(issuer=Issuer(path, LOG, **{**options, **more}))


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_signed_token_is_its_subject(tmp_path: Path, algorithm: str) -> None:
    known = issuing(jwks(tmp_path / "jwks.json", *KEYS))
    for _ in range(2):
        holder = known.admit(SCORING, bearer(signed(algorithm)))
        scopes = frozenset({Scope.SCORE})
        assert holder == Holder("robot@example", scopes, "sub:robot@example")


def forged() -> str:
    """A token that takes the public key for a shared secret, as old libraries did."""
    header, body, _ = signed().split(".")
    fields = json.loads(jwt.utils.base64url_decode(header))
    mine = jwt.utils.base64url_encode(json.dumps({**fields, "alg": "HS256"}).encode()).decode()
    public = json.dumps(jwt.get_algorithm_by_name("ES256").to_jwk(KEYS["ES256"].public_key()))
    signature = jwt.get_algorithm_by_name("HS256").sign(f"{mine}.{body}".encode(), public.encode())
    return f"{mine}.{body}.{jwt.utils.base64url_encode(signature).decode()}"


WRONG: dict[str, Callable[[], str]] = {
    "another key": lambda: signed(key=ec.generate_private_key(ec.SECP256R1())),
    "another issuer": lambda: signed(iss="https://other"),
    "another audience": lambda: signed(aud="other"),
    "no audience": lambda: signed(aud=None),
    "no subject": lambda: signed(sub=None),
    "no end": lambda: signed(exp=None),
    "not yet": lambda: signed(nbf=int(time.time()) + 60),
    "alg none": lambda: jwt.encode({"sub": "x"}, "", "none", headers={"kid": "ES256"}),
    "a shared secret": forged,
    "an unknown key": lambda: signed(kid="other"),
    "an algorithm that is not allowed": lambda: signed("EdDSA"),
    "cut": lambda: signed()[:-10],
    "no token": lambda: "a.b.c",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_token_that_is_not_the_issuers_is_refused(tmp_path: Path, wrong: str) -> None:
    known = issuing(jwks(tmp_path / "jwks.json", *KEYS), algorithms=("ES256",))
    assert known.admit(SCORING, bearer(signed()))
    for _ in range(2):
        assert refused(known, bearer(WRONG[wrong]())) == "TOKEN_INVALID"


def test_a_token_ends_and_clocks_may_differ(tmp_path: Path) -> None:
    path = jwks(tmp_path / "jwks.json", "ES256")
    late = bearer(signed(exp=int(time.time()) - 5))
    assert refused(issuing(path), late) == "TOKEN_EXPIRED"
    assert issuing(path, leeway=60).admit(SCORING, late)


def test_who_is_trusted_needs_no_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(TOKENS)
    path.chmod(0o600)
    known = Gate(Secrets(path, LOG), trusted=frozenset({ADMIN}))
    assert known.admit(ADMIN, ()) is None
    assert refused(known, []) == "TOKEN_MISSING"


@pytest.mark.parametrize(("exp", "reason"), [(str(1 << 40), ""), (float("inf"), "TOKEN_INVALID")])
def test_a_token_ends_at_a_whole_number_of_seconds(tmp_path: Path, exp: Any, reason: str) -> None:
    known = issuing(jwks(tmp_path / "jwks.json", "ES256"))
    claims = {"iss": "https://issuer", "aud": "likely", "sub": "robot", "scope": "score"}
    body = json.dumps({**claims, "exp": exp}).encode()
    token = bearer(jwt.api_jws.encode(body, KEYS["ES256"], "ES256"))
    assert refused(known, token) == reason if reason else known.admit(SCORING, token)


def test_a_remembered_token_ends_as_well(tmp_path: Path) -> None:
    known = issuing(jwks(tmp_path / "jwks.json", "ES256"))
    token = bearer(signed(exp=int(time.time()) + 4))
    assert known.admit(SCORING, token)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            known.admit(SCORING, token)
        except Unauthenticated as error:
            assert error.reason == "TOKEN_EXPIRED"
            return
        time.sleep(0.1)
    raise AssertionError("an expired token was let in")


def test_exchanged_keys_count_at_once(tmp_path: Path) -> None:
    path = jwks(tmp_path / "jwks.json", "ES256")
    known, old = issuing(path), bearer(signed())
    assert known.admit(SCORING, old)
    jwks(path, "EdDSA")
    assert refused(known, old) == "TOKEN_INVALID"
    assert known.admit(SCORING, bearer(signed("EdDSA")))


def test_keys_for_encryption_do_not_count(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no key for ES256"):
        issuing(jwks(tmp_path / "jwks.json", "ES256", use="enc"), algorithms=("ES256",))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": [{}]}', '{"keys": 1}', "[" * 10**5])
def test_a_file_without_keys_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"is no JSON Web Key Set|holds no key for"):
        issuing(path)


@pytest.mark.parametrize("word", ["kid", "alg"])
@pytest.mark.parametrize("value", [["ES256"], {}, 7])
def test_a_key_whose_name_is_no_text_is_one_sentence(tmp_path: Path, word: str, value: Any) -> None:
    path = jwks(tmp_path / "jwks.json", "ES256", **{word: value})
    with pytest.raises(SettingsError, match=f"is no JSON Web Key Set: the {word} of a key is no"):
        issuing(path)


def test_an_rsa_key_serves_all_of_its_algorithms(tmp_path: Path) -> None:
    path = jwks(tmp_path / "jwks.json", "RS256")
    known = issuing(path, algorithms=("PS256", "RS256", "ES256"))
    for algorithm, allowed in (("RS256", True), ("PS256", True), ("PS512", False)):
        token = bearer(signed(algorithm, KEYS["RS256"], "RS256"))
        if allowed:
            assert known.admit(SCORING, token)
        else:
            assert refused(known, token) == "TOKEN_INVALID"
    known = issuing(jwks(path, "RS256", alg="RS256"), algorithms=("PS256", "RS256"))
    assert known.admit(SCORING, bearer(signed("RS256")))
    assert refused(known, bearer(signed("PS256", KEYS["RS256"], "RS256"))) == "TOKEN_INVALID"


def unnamed(path: Path, count: int) -> list[str]:
    """Tokens of so many keys, all without a name, whose file that is."""
    pairs = [ec.generate_private_key(ec.SECP256R1()) for _ in range(count)]
    to_jwk = jwt.get_algorithm_by_name("ES256").to_jwk
    path.write_text(json.dumps({"keys": [to_jwk(p.public_key(), as_dict=True) for p in pairs]}))
    claims = jwt.decode(signed(), options={"verify_signature": False})
    return [jwt.encode(claims, pair, "ES256") for pair in pairs]


def test_keys_without_names_are_all_tried(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    tokens, known = unnamed(path, 3), issuing(path)
    for token in tokens:
        assert known.admit(SCORING, bearer(token))
    others = unnamed(tmp_path / "other.json", 1)
    assert refused(known, bearer(others[0])) == "TOKEN_INVALID"
    unnamed(path, 9)
    with pytest.raises(SettingsError, match="more than 8 keys of one kid, or of none"):
        issuing(path)


@pytest.mark.parametrize(("algorithms", "known"), [(("ES256",), True), (("ES256", "EdDSA"), False)])
def test_a_token_that_names_no_key_is_of_the_only_one(
    tmp_path: Path, algorithms: tuple[str, ...], known: bool
) -> None:
    gate = issuing(jwks(tmp_path / "jwks.json", *algorithms))
    claims = jwt.decode(signed(), options={"verify_signature": False})
    token = bearer(jwt.encode(claims, KEYS["ES256"], "ES256"))
    assert gate.admit(SCORING, token) if known else refused(gate, token) == "TOKEN_INVALID"


def test_a_key_that_is_too_short_signs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KEYS, "RS256", rsa.generate_private_key(65537, 1024))
    known = issuing(jwks(tmp_path / "jwks.json", "RS256"))
    with warnings.catch_warnings(action="ignore"):
        token = bearer(signed("RS256"))
    assert refused(known, token) == "TOKEN_INVALID"


def test_no_more_tokens_are_remembered_than_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MAX_CHECKED_TOKENS", 3)
    issuer = issuing(jwks(tmp_path / "jwks.json", "ES256"))._issuer
    assert issuer
    for i in range(8):
        assert issuer.find(signed(sub=f"robot-{i}")).name == f"robot-{i}"
        assert len(issuer._checked) <= 3


def test_a_file_that_is_too_large_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(TOKENS + "#" * LARGEST_FILE)
    with pytest.raises(SettingsError, match="has more than 1048576 bytes"):
        Secrets(path, LOG)


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({"scope": "score generate"}, {"score", "generate"}),
        ({"scope": None, "scp": ["admin"]}, {"admin"}),
        ({"scope": None}, set()),
        ({"scope": "scores"}, set()),
        ({"scope": 7}, set()),
    ],
)
def test_scopes_are_read_as_issuers_write_them(tmp_path: Path, claims: Any, scopes: Any) -> None:
    known = issuing(jwks(tmp_path / "jwks.json", "ES256"))
    holder = known.admit("likely.v1.ModelService", bearer(signed(**claims)))
    assert holder is not None
    assert holder.scopes == scopes


def test_a_name_from_outside_is_fit_for_a_log(tmp_path: Path) -> None:
    known = issuing(jwks(tmp_path / "jwks.json", "ES256"))
    holder = known.admit(SCORING, bearer(signed(sub="a\nb" + "x" * 100)))
    assert holder is not None
    assert holder.name == "a_b" + "x" * 61


def test_each_subject_is_a_client_of_its_own(tokens: Path, tmp_path: Path) -> None:
    keys = jwks(tmp_path / "jwks.json", "ES256")
    known = Gate(Secrets(tokens, LOG), issuing(keys)._issuer)
    spiffe = "spiffe://cluster.example/ns/production-of-pictures/sa/" + "worker-" * 8
    subjects = (f"{spiffe}1", f"{spiffe}2", "a b", "a_b", "pipeline")
    shown = [*(signed(sub=subject) for subject in subjects), "correct-horse-battery"]
    holders = [known.admit(SCORING, bearer(token)) for token in shown]
    assert len({holder.client for holder in holders if holder}) == 6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=9,
)
CLAIM = st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "scope", "scp", "jti", "crit"])


@given(header=st.dictionaries(CLAIM | st.sampled_from(["alg", "kid", "b64", "crit"]), JSON))
def test_no_header_of_a_token_harms(tmp_path_factory: Any, header: dict[str, Any]) -> None:
    path = jwks(tmp_path_factory.getbasetemp() / "jwks.json", "ES256")
    body = json.dumps(header).encode()
    token = ".".join(jwt.utils.base64url_encode(part).decode() for part in (body, b"{}", b"x"))
    assert refused(issuing(path), bearer(token)) == "TOKEN_INVALID"


@given(claims=st.dictionaries(CLAIM, JSON))
def test_no_claims_of_a_valid_signature_harm(tmp_path_factory: Any, claims: Any) -> None:
    path = jwks(tmp_path_factory.getbasetemp() / "jwks.json", "ES256")
    token = jwt.api_jws.encode(json.dumps(claims).encode(), KEYS["ES256"], "ES256")
    assert refused(issuing(path), bearer(token)) in ("TOKEN_INVALID", "TOKEN_EXPIRED")


@given(text=st.text(max_size=200))
def test_no_text_is_a_token(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "tokens.toml"
    path.write_text(TOKENS)
    keys = jwks(path.with_name("jwks.json"), "ES256")
    issuer = Issuer(keys, LOG, name="i", audience="a", algorithms=["ES256"])
    known = Gate(Secrets(path, LOG), issuer)
    assert refused(known, [("authorization", f"Bearer {text}")]) == "TOKEN_INVALID"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tls_key": Path("k")}, "together"),
        ({"tls_client_ca": Path("k")}, "tls_client_ca needs"),
        ({"jwt_keys": Path("k")}, "jwt_keys needs jwt_issuer and jwt_audience"),
        ({"jwt_issuer": "i", "jwt_audience": "a"}, "jwt_issuer and jwt_audience need jwt_keys"),
        ({"tokens": None, "jwt_issuer": "i"}, "need jwt_keys"),
        ({"tokens": Path("none")}, "none cannot be read: No such file"),
        ({"host": "0.0.0.0"}, "unencrypted to 0.0.0.0"),
        ({"admin_host": "0.0.0.0", "admin_port": 0}, "unencrypted to 0.0.0.0"),
        ({"admin_host": "0.0.0.0", "admin_port": 0, "tokens": None}, "everybody who reaches"),
    ],
)
def test_settings_that_let_in_the_wrong_are_refused(
    tokens: Path, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence):
        gate(load({"tokens": tokens, **fields}), LOG)


def test_settings_make_the_gate(tokens: Path) -> None:
    assert gate(load({}), LOG).is_open
    assert not gate(load({"tokens": tokens}), LOG).is_open
    assert not gate(
        load({"tokens": tokens, "host": "0.0.0.0", "plaintext_tokens": True}), LOG
    ).is_open
    known = gate(load({"tokens": tokens}), LOG)
    assert known.admit(SCORING, bearer("correct-horse-battery"))


def test_settings_make_the_issuer(tmp_path: Path) -> None:
    path = jwks(tmp_path / "jwks.json", "ES256")
    options: dict[str, Any] = {
        "jwt_keys": path, "jwt_issuer": "https://issuer", "jwt_audience": "likely",
    }  # fmt: skip
    late = bearer(signed(exp=int(time.time()) - 100))
    assert gate(load({**options, "jwt_leeway": 200}), LOG).admit(SCORING, late)
    assert refused(gate(load({**options, "jwt_leeway": 0}), LOG), late) == "TOKEN_EXPIRED"
    with pytest.raises(SettingsError, match="holds no key for EdDSA"):
        gate(load({**options, "jwt_algorithms": ("EdDSA",)}), LOG)
