"""Access control by bearer tokens: secrets in a file, or signed by an issuer; with scopes."""

from __future__ import annotations

import hashlib
import json
import re
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from likely.addresses import is_local
from likely.errors import AccessDenied, SettingsError, Unauthenticated
from likely.fresh import INTERVAL
from likely.serving.reloading import reloaded
from likely.settings import Settings

if TYPE_CHECKING:
    import jwt
    from structlog.typing import FilteringBoundLogger

AUTHORIZATION = "authorization"
LARGEST_FILE = 1 << 20  # bytes
MAX_CHECKED_TOKENS = 4096  # maximum number of checked tokens that are remembered
MAX_KEYS_PER_KID = 8  # keys with the same kid and algorithm; each token is tried with all of them
_UNSAFE = re.compile(r"[^A-Za-z0-9@._|:/-]")


class Scope(StrEnum):
    """What a token may allow."""

    SCORE = "score"
    GENERATE = "generate"
    ADMIN = "admin"


UNKNOWN = "unknown"
"""Stands for any service or method that does not exist."""

OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})
"""Services that require no token, as whatever starts and watches a server has none."""

SCOPES: dict[str, Scope | None] = {
    "likely.v1.ScoringService": Scope.SCORE,
    "likely.v1.GenerationService": Scope.GENERATE,
    "likely.v1.LatentService": Scope.GENERATE,
    "likely.v1.ModelService": None,
    "inference.GRPCInferenceService": None,
    "grpc.reflection.v1.ServerReflection": None,
    "grpc.reflection.v1alpha.ServerReflection": None,
    UNKNOWN: None,
}
"""The scope that each service requires; None for any valid token. Unlisted services need ADMIN.

GRPCInferenceService checks the scope itself, by the operation that a request asks for.
"""


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a valid token.

    Attributes:
        name: name for people: the token's name in its file, or the issuer's subject, shortened
            and with unsafe characters replaced.
        scopes: the scopes that the token grants.
        client: identity for quotas and fair queuing, unique among all holders.
    """

    name: str
    scopes: frozenset[Scope]
    client: str


class _Token(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9@._-]{0,63}$")
    scopes: frozenset[Scope]
    secret: Annotated[str, Field(pattern=r"^[!-~]{16,512}$")] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _has_one_secret(self) -> _Token:
        if (self.secret is None) == (self.sha256 is None):
            raise ValueError("exactly one of secret and sha256 is required")
        return self

    def digest(self) -> bytes:
        return _digest(self.secret) if self.secret is not None else bytes.fromhex(self.sha256 or "")


class _TokenFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    token: tuple[_Token, ...]


class Secrets:
    """The tokens in a TOML file; each has a name, scopes, and a secret or its SHA-256."""

    def __init__(self, path: Path, log: FilteringBoundLogger, interval: float = INTERVAL) -> None:
        """Reads the tokens of a file, and reads them again when it changes.

        The file may contain no token, in which case none is valid.

        Raises:
            SettingsError: the file cannot be read, or does not have this format.
        """
        self._known = reloaded([path], lambda: _read_secrets(path), log, interval)
        if not self._known.value():
            log.warning("no token is valid", file=str(path))

    def find(self, token: str) -> Holder | None:
        """Returns the holder of a token; None if the token is not in the file."""
        # The time of the lookup may leak digests, which nobody can choose, but no secrets.
        return self._known.value().get(_digest(token))


class Issuer:
    """Tokens signed by an issuer (JWT), whose public keys are in a file (JWKS)."""

    def __init__(
        self,
        keys: Path,
        log: FilteringBoundLogger,
        *,
        name: str,
        audience: str,
        algorithms: Sequence[str],
        leeway: float = 0.0,
        interval: float = INTERVAL,
    ) -> None:
        """Reads the issuer's keys.

        Args:
            keys: the issuer's JWKS file, read again when it changes.
            log: receives reloads, and why a token is refused.
            name: the claim `iss` that every token must have.
            audience: the claim `aud` that every token must have.
            algorithms: allowed signature algorithms; none of them uses a shared secret.
            leeway: seconds by which clocks may differ.
            interval: minimum number of seconds between two checks of the file.

        Raises:
            SettingsError: the file cannot be read, or holds keys but none for these algorithms.
        """
        self._keys = reloaded([keys], lambda: _read_keys(keys, algorithms), log, interval)
        if not self._keys.value():
            log.warning("no signed token is valid", file=str(keys))
        self._log = log
        self._name = name
        self._audience = audience
        self._algorithms = list(algorithms)
        self._leeway = leeway
        # Remembered by digest, as checking a signature takes longer than scoring a small picture.
        self._checked: dict[bytes, tuple[Holder, float]] = {}
        self._checked_by = self._keys.value()

    def find(self, token: str) -> Holder:
        """Returns the holder of a token.

        Raises:
            Unauthenticated: the token is not from the issuer, not for this audience, or not valid
                now.
        """
        keys = self._keys.value()
        if keys is not self._checked_by or len(self._checked) >= MAX_CHECKED_TOKENS:
            self._checked, self._checked_by = {}, keys
        mark = _digest(token)
        holder, ends = self._checked.get(mark, (None, 0.0))
        if holder is None or time.time() >= ends:
            self._checked.pop(mark, None)
            holder, ends = self._checked[mark] = self._check(token, keys)
        return holder

    def _check(self, token: str, keys: tuple[jwt.PyJWK, ...]) -> tuple[Holder, float]:
        import jwt

        try:
            claims = self._claims(token, keys)
            until = int(claims["exp"]) + self._leeway
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the token has expired", "TOKEN_EXPIRED") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            self._log.info("token refused", reason=f"{type(error).__name__}: {error}"[:200])
            raise _invalid_token() from None
        name = _UNSAFE.sub("_", claims["sub"])[:64]
        # Names in token files have no colon, so no two holders share a client.
        return Holder(name, _scopes(claims), f"sub:{claims['sub']}"), until

    def _claims(self, token: str, keys: tuple[jwt.PyJWK, ...]) -> dict[str, Any]:
        """Returns the claims of a token that was signed with one of the keys.

        Raises:
            PyJWTError: it was signed with none of them, or is not valid here and now.
        """
        import jwt

        header = jwt.get_unverified_header(token)
        kid, kids = header.get("kid"), {key.key_id for key in keys}
        if kid is None and len(kids) == 1:
            (kid,) = kids
        wrong: jwt.PyJWTError = jwt.InvalidKeyError("no such key for such an algorithm")
        for key in keys:
            if (key.key_id, key.algorithm_name) != (kid, header.get("alg")):
                continue
            try:
                return jwt.decode(
                    token,
                    key,
                    algorithms=self._algorithms,
                    audience=self._audience,
                    issuer=self._name,
                    leeway=self._leeway,
                    options={
                        "require": ["exp", "iss", "aud", "sub"],
                        "enforce_minimum_key_length": True,
                    },
                )
            except (jwt.InvalidSignatureError, jwt.InvalidKeyError) as error:
                wrong = error
        raise wrong


class Gate:
    """Admits callers by their tokens; without secrets and issuer, admits everybody."""

    def __init__(
        self,
        secrets: Secrets | None = None,
        issuer: Issuer | None = None,
        trusted: frozenset[str] = frozenset(),
    ) -> None:
        self._secrets = secrets
        self._issuer = issuer
        self._open = OPEN_SERVICES | trusted

    @property
    def is_open(self) -> bool:
        """Whether no token is required."""
        return self._secrets is None and self._issuer is None

    def admit(self, service: str, metadata: Iterable[tuple[str, str | bytes]]) -> Holder | None:
        """Returns the holder of the caller's token; None if the service requires no token.

        Args:
            service: full name of the service.
            metadata: metadata of the call.

        Raises:
            Unauthenticated: there is no token, or it is not valid.
            AccessDenied: the token is valid, but lacks the scope that the service requires.
        """
        if self.is_open or service in self._open:
            return None
        holder = self._find_holder(_bearer_token(metadata))
        scope = SCOPES.get(service, Scope.ADMIN)
        if scope is not None and scope not in holder.scopes:
            raise AccessDenied(f"the token of {holder.name} lacks the scope {scope}")
        return holder

    def _find_holder(self, token: str) -> Holder:
        if self._secrets and (holder := self._secrets.find(token)):
            return holder
        if self._issuer:
            return self._issuer.find(token)
        raise _invalid_token()


def gate(
    settings: Settings, log: FilteringBoundLogger, trusted: frozenset[str] = frozenset()
) -> Gate:
    """Creates the gate that the settings ask for.

    Args:
        settings: settings that name the files of tokens and keys.
        log: receives why tokens are refused.
        trusted: services whose callers need no token.

    Raises:
        SettingsError: a file cannot be used, a setting is given without another that it needs,
            tokens would come unencrypted from other machines, or the admin RPCs would be open to
            anybody on other machines.
    """
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise SettingsError("tls_certificate and tls_key must be given together, or neither")
    if settings.tls_client_ca and not settings.tls_certificate:
        raise SettingsError("tls_client_ca needs tls_certificate and tls_key")
    if (settings.jwt_issuer or settings.jwt_audience) and not settings.jwt_keys:
        raise SettingsError("jwt_issuer and jwt_audience need jwt_keys")
    secrets = Secrets(settings.tokens, log) if settings.tokens else None
    issuer = None
    if settings.jwt_keys:
        if not (settings.jwt_issuer and settings.jwt_audience):
            raise SettingsError("jwt_keys needs jwt_issuer and jwt_audience")
        issuer = Issuer(
            settings.jwt_keys,
            log,
            name=settings.jwt_issuer,
            audience=settings.jwt_audience,
            algorithms=settings.jwt_algorithms,
            leeway=settings.jwt_leeway,
        )
    made = Gate(secrets, issuer, trusted)
    encrypted = settings.tls_certificate is not None or settings.plaintext_tokens
    admin = [] if settings.admin_port == "off" else [settings.admin_host]
    if made.is_open and not all(map(is_local, admin)):
        raise SettingsError(
            f"everybody who reaches {settings.admin_host} could change what is served; "
            "give tokens or jwt_keys"
        )
    for host in (settings.host, *admin):
        if not (made.is_open or encrypted or is_local(host)):
            raise SettingsError(
                f"tokens would come unencrypted to {host}; give tls_certificate and tls_key, "
                "or plaintext_tokens where a proxy has TLS"
            )
    return made


def _bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    headers = [value for key, value in metadata if key == AUTHORIZATION]
    if not headers:
        raise Unauthenticated("a bearer token is required in 'authorization'", "TOKEN_MISSING")
    scheme, _, token = str(headers[0]).partition(" ")
    if len(headers) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise _invalid_token()
    return token.strip()


def _invalid_token() -> Unauthenticated:
    return Unauthenticated("the token is not valid here", "TOKEN_INVALID")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _scopes(claims: dict[str, Any]) -> frozenset[Scope]:
    """The scopes in the claim `scope` (RFC 9068), or in `scp`, as some issuers call it."""
    claim = claims.get("scope", claims.get("scp", ()))
    words = claim.split() if isinstance(claim, str) else claim
    words = words if isinstance(words, list) else []
    return frozenset(scope for scope in Scope if scope in words)


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            data = handle.read(LARGEST_FILE + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_FILE:
        raise SettingsError(f"{path} has more than {LARGEST_FILE} bytes")
    return data


def _read_secrets(path: Path) -> dict[bytes, Holder]:
    """Reads the holders in a token file, by the SHA-256 of their secrets."""
    try:
        parsed = _TokenFile.model_validate(tomllib.loads(_read_file(path).decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]  # the input is not reported, as it may be a secret
        where = ".".join(str(part) for part in first["loc"]) or "token"
        raise SettingsError(f"{path} is no file of tokens: {where}: {first['msg']}") from None
    if len({token.name for token in parsed.token}) < len(parsed.token):
        raise SettingsError(f"{path} gives two tokens one name")
    holders = {
        token.digest(): Holder(token.name, token.scopes, token.name) for token in parsed.token
    }
    if len(holders) < len(parsed.token):
        raise SettingsError(f"{path} gives two tokens one secret")
    return holders


def _read_keys(path: Path, algorithms: Sequence[str]) -> tuple[jwt.PyJWK, ...]:
    """Reads the keys of a file, which may be empty; one for each algorithm that a key can serve.

    Raises:
        SettingsError: the file cannot be used.
    """
    try:
        entries = json.loads(_read_file(path)).get("keys")
        if not isinstance(entries, list):
            raise TypeError("its keys are no list")
        keys = tuple(key for entry in entries for key in _parse_key(entry, algorithms))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise SettingsError(f"{path} is no JSON Web Key Set: {error}") from error
    if entries and not keys:
        raise SettingsError(f"{path} holds no key for {', '.join(algorithms)}")
    alike = Counter((key.key_id, key.algorithm_name) for key in keys)
    if max(alike.values(), default=0) > MAX_KEYS_PER_KID:
        raise SettingsError(
            f"{path} holds more than {MAX_KEYS_PER_KID} keys of one kid, or of none"
        )
    return keys


def _parse_key(jwk: dict[str, Any], algorithms: Sequence[str]) -> list[jwt.PyJWK]:
    """Returns a key once for each algorithm that it can serve; none if it cannot be used here.

    Raises:
        ValueError: its name or algorithm is not a string.
        AttributeError: it is not a JSON object.
    """
    import jwt  # only if used, as importing it takes as long as opening a small bundle

    for word in ("kid", "alg"):
        if not isinstance(jwk.get(word), str | None):
            raise ValueError(f"the {word} of a key is no string")
    if jwk.get("use") not in (None, "sig"):
        return []
    names: Sequence[str | None] = (None,)  # PyJWK takes the key's own algorithm, or its curve's
    if jwk.get("kty") == "RSA" and not jwk.get("alg"):
        names = [name for name in algorithms if name.startswith(("RS", "PS"))]
    try:
        keys = [jwt.PyJWK(jwk, name) for name in names]
    except jwt.PyJWTError:  # for example, not a key at all, or of an unknown kind
        return []
    return [key for key in keys if key.algorithm_name in algorithms]
