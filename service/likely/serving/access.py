"""Who may ask what: bearer tokens, secrets of a file or signed by an issuer, and their scopes."""

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
from likely.serving.fresh import INTERVAL, Fresh
from likely.settings import Settings

if TYPE_CHECKING:
    import jwt
    from structlog.typing import FilteringBoundLogger

AUTHORIZATION = "authorization"
LARGEST_FILE = 1 << 20
REMEMBERED = 4096
MOST_ALIKE = 8  # keys that nothing but a signature tells apart: each is tried, for anybody's token
_UNSAFE = re.compile(r"[^A-Za-z0-9@._|:/-]")


class Scope(StrEnum):
    """What a token may be allowed."""

    SCORE = "score"
    GENERATE = "generate"
    ADMIN = "admin"


UNKNOWN = "unknown"
"""What stands for a service or a method that there is not."""

OPEN = frozenset({"grpc.health.v1.Health"})
"""Services that ask for no token: what starts and watches a server has none."""

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
"""The scope that each service asks for; None is any valid token, a service not listed is ADMIN.

GRPCInferenceService itself asks for the scope of what a request wants from a model.
"""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who a valid token speaks for.

    Attributes:
        name: for people: of the token in its file, or the subject that the issuer names, cut and
            cleaned.
        scopes: what it is allowed.
        client: whom its requests are counted against, of all holders this one alone.
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
            raise ValueError("exactly one of secret and sha256 is asked")
        return self

    def digest(self) -> bytes:
        return _digest(self.secret) if self.secret is not None else bytes.fromhex(self.sha256 or "")


class _TokenFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    token: tuple[_Token, ...]


class Secrets:
    """The tokens of a TOML file: name, scopes, and a secret or its SHA-256."""

    def __init__(self, path: Path, log: FilteringBoundLogger, interval: float = INTERVAL) -> None:
        """The tokens of that file, read again when it changes; all may be withdrawn then.

        Raises:
            SettingsError: it cannot be read, or is no such file.
        """
        self._known = Fresh([path], lambda: _secrets(path), log, interval)
        if not self._known.value():
            log.warning("no token is valid", file=str(path))

    def find(self, token: str) -> Holder | None:
        """Whose token it is; None where it is nobody's."""
        # The time that this takes may tell of digests, which nobody chooses, but of no secret.
        return self._known.value().get(_digest(token))


class Issuer:
    """Tokens that an issuer signs (JWT), with its public keys in a file (JWKS)."""

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
        """The issuer whose tokens are believed.

        Args:
            keys: its JWKS file, read again when it changes.
            log: where reloads are told, and why a token is refused.
            name: the claim `iss` that every token must have.
            audience: the claim `aud` that every token must have.
            algorithms: that they may be signed with; none of them with a shared secret.
            leeway: seconds that clocks may differ.
            interval: seconds between two looks at the file.

        Raises:
            SettingsError: the file cannot be read, or holds no key that these algorithms can use.
        """
        self._keys = Fresh([keys], lambda: _keys(keys, algorithms), log, interval)
        if not self._keys.value():
            log.warning("no signed token is valid", file=str(keys))
        self._log = log
        self._name = name
        self._audience = audience
        self._algorithms = list(algorithms)
        self._leeway = leeway
        # Checking a signature takes longer than scoring a small picture.
        self._checked: dict[bytes, tuple[Holder, float]] = {}
        self._checked_by = self._keys.value()

    def find(self, token: str) -> Holder:
        """Whose token it is.

        Raises:
            Unauthenticated: it is not the issuer's, not for this audience, or not valid now.
        """
        keys = self._keys.value()
        if keys is not self._checked_by or len(self._checked) >= REMEMBERED:
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
            raise _invalid() from None
        name = _UNSAFE.sub("_", claims["sub"])[:64]
        # No name in a file has a colon.
        return Holder(name, _scopes(claims), f"sub:{claims['sub']}"), until

    def _claims(self, token: str, keys: tuple[jwt.PyJWK, ...]) -> dict[str, Any]:
        """What a token tells that one of the keys has signed.

        Raises:
            PyJWTError: none has, or it is not valid here and now.
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
    """Lets callers in by their tokens; without any kind of token everybody."""

    def __init__(
        self,
        secrets: Secrets | None = None,
        issuer: Issuer | None = None,
        trusted: frozenset[str] = frozenset(),
    ) -> None:
        self._secrets = secrets
        self._issuer = issuer
        self._open = OPEN | trusted

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        return self._secrets is None and self._issuer is None

    def admit(self, service: str, metadata: Iterable[tuple[str, str | bytes]]) -> Holder | None:
        """Who calls that service; None where nobody needs to say.

        Args:
            service: its full name.
            metadata: of the call.

        Raises:
            Unauthenticated: no token, or none that is valid.
            AccessDenied: a valid token without the scope that the service asks for.
        """
        if self.is_open or service in self._open:
            return None
        holder = self._caller(_bearer(metadata))
        scope = SCOPES.get(service, Scope.ADMIN)
        if scope is not None and scope not in holder.scopes:
            raise AccessDenied(f"the token of {holder.name} lacks the scope {scope}")
        return holder

    def _caller(self, token: str) -> Holder:
        if self._secrets and (holder := self._secrets.find(token)):
            return holder
        if self._issuer:
            return self._issuer.find(token)
        raise _invalid()


def gate(
    settings: Settings, log: FilteringBoundLogger, trusted: frozenset[str] = frozenset()
) -> Gate:
    """What lets callers in.

    Args:
        settings: name the files of tokens and keys.
        log: where refused tokens are told.
        trusted: services whose callers need no token.

    Raises:
        SettingsError: a file cannot be used, a setting lacks its other half, or tokens would
            come unencrypted from other machines, or anybody there could reach the admin RPCs.
    """
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise SettingsError("tls_certificate and tls_key are given together, or neither")
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


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    given = [value for key, value in metadata if key == AUTHORIZATION]
    if not given:
        raise Unauthenticated("a bearer token is asked for in 'authorization'", "TOKEN_MISSING")
    scheme, _, token = str(given[0]).partition(" ")
    if len(given) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise _invalid()
    return token.strip()


def _invalid() -> Unauthenticated:
    return Unauthenticated("the token is not valid here", "TOKEN_INVALID")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _scopes(claims: dict[str, Any]) -> frozenset[Scope]:
    """The scopes of RFC 9068's `scope`, or of `scp` as some issuers call it."""
    given = claims.get("scope", claims.get("scp", ()))
    words = given.split() if isinstance(given, str) else given
    words = words if isinstance(words, list) else []
    return frozenset(scope for scope in Scope if scope in words)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            data = handle.read(LARGEST_FILE + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_FILE:
        raise SettingsError(f"{path} has more than {LARGEST_FILE} bytes")
    return data


def _secrets(path: Path) -> dict[bytes, Holder]:
    """Who holds each secret, by its SHA-256."""
    try:
        parsed = _TokenFile.model_validate(tomllib.loads(_read(path).decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]  # its input is left out: it may be a secret
        where = ".".join(str(part) for part in first["loc"]) or "token"
        raise SettingsError(f"{path} is no file of tokens: {where}: {first['msg']}") from None
    if len({token.name for token in parsed.token}) < len(parsed.token):
        raise SettingsError(f"{path} gives two tokens one name")
    holders = {each.digest(): Holder(each.name, each.scopes, each.name) for each in parsed.token}
    if len(holders) < len(parsed.token):
        raise SettingsError(f"{path} gives two tokens one secret")
    return holders


def _keys(path: Path, algorithms: Sequence[str]) -> tuple[jwt.PyJWK, ...]:
    """The keys of a file, each once for every algorithm that it may serve; none if it has none."""
    try:
        found = json.loads(_read(path)).get("keys")
        if not isinstance(found, list):
            raise TypeError("its keys are no list")
        keys = tuple(key for each in found for key in _of_each(each, algorithms))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise SettingsError(f"{path} is no JSON Web Key Set: {error}") from error
    if found and not keys:
        raise SettingsError(f"{path} holds no key for {', '.join(algorithms)}")
    alike = Counter((key.key_id, key.algorithm_name) for key in keys)
    if max(alike.values(), default=0) > MOST_ALIKE:
        raise SettingsError(f"{path} holds more than {MOST_ALIKE} keys of one kid, or of none")
    return keys


def _of_each(given: dict[str, Any], algorithms: Sequence[str]) -> list[jwt.PyJWK]:
    """One key for every algorithm that it may serve; none if it is of no use here.

    Raises:
        ValueError: its name or algorithm is no text.
        AttributeError: it is no object.
    """
    import jwt  # where tokens are signed: it takes as long to import as a small bundle to open

    for word in ("kid", "alg"):
        if not isinstance(given.get(word), str | None):
            raise ValueError(f"the {word} of a key is no text")
    if given.get("use") not in (None, "sig"):
        return []
    names: Sequence[str | None] = (None,)  # its own, or what its curve is for
    if given.get("kty") == "RSA" and not given.get("alg"):
        names = [name for name in algorithms if name.startswith(("RS", "PS"))]
    try:
        keys = [jwt.PyJWK(given, name) for name in names]
    except jwt.PyJWTError:  # such as no key at all, or of a kind that nobody knows
        return []
    return [key for key in keys if key.algorithm_name in algorithms]
