"""The server's settings: from flags, else the environment (LIKELY_*), a TOML file, or defaults."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from likely.answers import NAME_PATTERN, VERSION_LABELS, Limits
from likely.errors import SettingsError

PREFIX = "LIKELY_"
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")


def _split_words(value: Any) -> Any:
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _split_paths(value: Any) -> Any:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _reject_empty(value: Any) -> Any:
    if value == "":  # such as an empty variable; Path would take it for the current folder
        raise ValueError("the name of a file or folder, or not be given")
    return value


def _require_a_path(value: Any) -> Any:
    if isinstance(value, str) and not _split_paths(value):
        raise ValueError("one file at least, or not be given")
    return value


Port = Annotated[int, Field(ge=0, le=65535)]
File = Annotated[Path, BeforeValidator(_reject_empty)]
Paths = Annotated[tuple[File, ...], NoDecode, BeforeValidator(_split_paths)]
Algorithm = Literal[
    "EdDSA", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512", "RS256", "RS384", "RS512"
]
# Algorithms of a token's signature; none of them uses a shared secret.
Algorithms = Annotated[
    tuple[Algorithm, ...], NoDecode, BeforeValidator(_split_words), Field(min_length=1)
]


def _check_version_label(text: str) -> str:
    labels = "|".join(VERSION_LABELS)
    if not re.fullmatch(f"{NAME_PATTERN}:({labels})={NAME_PATTERN}", text):
        raise ValueError("MODEL:stable=VERSION or MODEL:canary=VERSION, such as digits:stable=1.0")
    return text


def _check_one_version_each(labels: tuple[str, ...]) -> tuple[str, ...]:
    named = [label.partition("=")[0] for label in dict.fromkeys(labels)]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise ValueError(f"one version for {twice}")
    return labels


VersionLabel = Annotated[str, AfterValidator(_check_version_label)]
VersionLabels = Annotated[
    tuple[VersionLabel, ...],
    NoDecode,
    BeforeValidator(_split_words),
    AfterValidator(_check_one_version_each),
]


class Settings(BaseSettings):
    """What `likely serve` runs with; every field is a flag, a LIKELY_ variable and a TOML key."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX)

    config: File | None = None
    """TOML file that the other settings are read from."""
    bundles: Paths = ()
    """Folders of bundles to serve; none means those of the package, unless a folder is watched."""
    watch: File | None = None
    """Folder of further bundles, polled while serving: new and changed bundles are loaded."""
    watch_seconds: float = Field(5.0, gt=0, le=3600, allow_inf_nan=False)
    """Seconds between two polls of that folder."""
    labels: VersionLabels = ()
    """Labels of versions, such as digits:stable=1.0; a label is stable or canary."""
    default_version: Literal["newest", "oldest"] = "newest"
    """Which version answers a request that names none, if no version is labelled stable."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 listens on all."""
    port: Port = 50051
    """Port of the gRPC server; 0 takes any free one."""
    admin_host: str = Field("127.0.0.1", min_length=1)
    """Address of the admin RPCs."""
    admin_port: Port | Literal["off"] = "off"
    """Port of the admin RPCs; 0 takes any free one."""
    metrics_host: str = Field("127.0.0.1", min_length=1)
    """Address of the Prometheus metrics."""
    metrics_port: Port | Literal["off"] = 9464
    """Port of the Prometheus metrics; 0 takes any free one."""
    tls_certificate: File | None = None
    """PEM file of the server's certificate chain; with it, every connection is encrypted."""
    tls_key: File | None = None
    """PEM file of that certificate's key, unencrypted."""
    tls_client_ca: File | None = None
    """PEM file of authorities: a client must show a certificate that one of them issued."""
    tokens: File | None = None
    """TOML file of bearer tokens; with it, or with jwt_keys, a request needs a token."""
    jwt_keys: File | None = None
    """JWKS file of the issuer whose signed tokens are accepted."""
    jwt_issuer: str = ""
    """Value of the claim `iss` that a signed token must have."""
    jwt_audience: str = ""
    """Value of the claim `aud` that a signed token must have."""
    jwt_algorithms: Algorithms = ("ES256", "EdDSA", "RS256", "PS256")
    """Algorithms that a token may be signed with."""
    jwt_leeway: float = Field(30.0, ge=0, le=600, allow_inf_nan=False)
    """Seconds by which the issuer's clock may differ from ours."""
    plaintext_tokens: bool = False
    """Whether other machines may send tokens unencrypted, as a proxy that terminates TLS does."""
    require_signature: Annotated[Paths, BeforeValidator(_require_a_path)] = ()
    """PEM files of public keys or certificates; one of them must have signed each bundle."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")
    """What runs the models: auto, cpu, cuda or cuda:N. There is no silent fallback from cuda."""
    gpu_memory: int = Field(0, ge=0, le=1 << 20)
    """MiB of a card's memory for the runs of each graph, besides their inputs; 0 is no limit."""
    workers: int = Field(1, ge=0, le=256)
    """Processes that serve on one port; 0 starts one per core, or one on a card."""
    threads: int = Field(0, ge=0, le=1024)
    """Threads of the runtime in each process; 0 divides the cores among the processes."""
    lanes: int = Field(0, ge=0, le=1024)
    """Runs of a model at once; 0 lets the warm-up find the best number."""
    max_batch: int = Field(0, ge=0, le=4096)
    """Most pictures of one run of a graph; 0 lets the warm-up find the best number."""
    queued_images: int = Field(4096, ge=1, le=1 << 24)
    """Pictures that may wait for one of a model's graphs."""
    queued_bytes: int = Field(64 << 20, ge=1024, le=1 << 40)
    """Bytes that may wait for one of a model's graphs."""
    client_images_per_second: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Pictures a second that one client may ask for; 0 is no limit."""
    client_images_at_once: int = Field(1024, ge=1, le=1 << 24)
    """Pictures that one client may ask for at once after a pause, if there is such a limit."""
    withheld_answers: int = Field(10, ge=0, le=1 << 20)
    """Non-finite answers in a row after which a version stops answering; 0 is no limit."""
    images_per_request: int = Field(1024, ge=1, le=1 << 20)
    """Most pictures in one request."""
    images_per_generation: int = Field(4096, ge=1, le=1 << 20)
    """Most pictures that one request may have drawn, completed or decoded."""
    images_per_chunk: int = Field(64, ge=1, le=4096)
    """Pictures in one chunk of a Generate or Complete stream."""
    request_bytes: int = Field(16 << 20, ge=1024, le=1 << 30)
    """Bytes of the largest request."""
    response_bytes: int = Field(64 << 20, ge=1024, le=1 << 30)
    """Most bytes of pictures, or maps, in one answer."""
    default_alpha: float = Field(0.05, gt=0, lt=1, allow_inf_nan=False)
    """Rate of false rejections where a request names none."""
    tracing: bool = False
    """Whether traces are sent by OTLP; OpenTelemetry's OTEL_* variables set the destination."""
    drift_level: float = Field(1e-3, ge=0, lt=1, allow_inf_nan=False)
    """Accepted probability that a version ever raises a false drift alarm; 0 is no test."""
    drain_delay: float = Field(1.0, ge=0, le=600, allow_inf_nan=False)
    """Seconds after SIGTERM in which requests are accepted, though health says NOT_SERVING."""
    drain_seconds: float = Field(30.0, ge=0, le=3600, allow_inf_nan=False)
    """Seconds after that in which accepted requests may finish."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The lowest level of events that are logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """How events are logged; auto is console on a terminal and json elsewhere."""
    connection_seconds: float = Field(0.0, ge=0, le=86_400 * 7, allow_inf_nan=False)
    """Seconds after which a connection's client is told to open a new one; 0 is no limit."""
    streams_per_connection: int = Field(100, ge=2, le=1 << 20)
    """Requests, and watches, that one connection may have at once; more wait in the client."""
    slow_reader_seconds: float = Field(60.0, gt=0, le=3600, allow_inf_nan=False)
    """Seconds that a stream waits for a caller that does not read, before it is cut off."""
    reflection: bool = True
    """Whether gRPC reflection is served."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the TOML file that one of these two names."""
        environment = {k: v for k, v in env_settings().items() if not is_link(k, v)}
        path = init_settings().get("config") or environment.get("config")
        file = InitSettingsSource(settings_cls, _read_toml(Path(path)) if path else {})
        return init_settings, InitSettingsSource(settings_cls, environment), file

    @property
    def version_labels(self) -> dict[tuple[str, str], str]:
        """Versions by model name and label."""
        parts = (text.replace("=", ":").split(":") for text in self.labels)
        return {(name, label): version for name, label, version in parts}

    @property
    def limits(self) -> Limits:
        """The limits that requests are held to."""
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})

    def toml(self) -> str:
        """The settings as the TOML file that would give them."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude={"config"}, exclude_none=True))


def is_link(name: str, value: Any) -> bool:
    """Whether a variable is one of Kubernetes for a Service, such as LIKELY_PORT=tcp://..."""
    return name.lower().endswith("port") and bool(_SERVICE_LINK.match(str(value)))


def load(flags: Mapping[str, Any]) -> Settings:
    """The settings in force.

    Args:
        flags: the values that the command line gives, by field.

    Raises:
        SettingsError: a key does not exist, or a value is not allowed.
    """
    try:
        return Settings(**flags)
    except ValidationError as error:
        raise SettingsError(_describe_error(error)) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as handle:
            values = tomllib.load(handle)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    if unknown := sorted(set(values) - set(Settings.model_fields) | {"config"} & set(values)):
        known = ", ".join(name for name in Settings.model_fields if name != "config")
        raise SettingsError(f"{path} sets {unknown[0]}, which is no setting; they are {known}")
    return values


def _describe_error(error: ValidationError) -> str:
    first, *others = error.errors()
    key = str(first["loc"][0])
    # A union gives one error for each of its members: together they say what is allowed.
    allowed = [first["msg"], *(e["msg"] for e in others if e["loc"][0] == key)]
    bare = (text.removeprefix("Value error, ") for text in allowed)
    expected = " or ".join(text.removeprefix("Input should be ") for text in bare)
    return f"{key} = {first['input']!r} is not allowed; it should be {expected}"
