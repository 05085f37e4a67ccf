"""The committed stubs and the versions that users are asked for agree."""

import re
import tomllib
from pathlib import Path

V1 = Path("service/likely/v1")


def floor(name: str) -> str:
    """The lowest version of a dependency that the project asks for."""
    lines: list[str] = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    return next(line.removeprefix(f"{name}>=") for line in lines if line.startswith(f"{name}>="))


def test_protobuf_floor_is_what_the_messages_were_generated_with() -> None:
    texts = [path.read_text() for path in V1.glob("*_pb2.py")]
    found = {re.search(r"^# Protobuf Python Version: (\S+)$", text, re.M) for text in texts}
    assert {match and match[1] for match in found} == {floor("protobuf")}


def test_grpcio_floor_is_what_the_services_were_generated_with() -> None:
    texts = [path.read_text() for path in V1.glob("*_pb2_grpc.py")]
    found = {re.search(r"^GRPC_GENERATED_VERSION = '(\S+)'$", text, re.M) for text in texts}
    assert {match and match[1] for match in found} == {floor("grpcio")}
