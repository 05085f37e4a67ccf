"""Signed bundles: what was signed is served, anything else is not."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from likely.bundle import MANIFEST, Bundle, signing, write_manifest
from likely.cli import main
from likely.errors import BundleError, SettingsError

if TYPE_CHECKING:
    from tests.conftest import Running, Toy

pytest.importorskip("model_signing")
PEM = serialization.Encoding.PEM


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    """A copy of the toy bundle, to be signed."""
    return Path(shutil.copytree(toy.path, tmp_path / "signed"))


def pair(folder: Path, name: str, curve: Any = ec.SECP256R1, password: bytes = b"") -> Path:
    """The private key's file; the public one's ends in .pub."""
    key = ec.generate_private_key(curve())
    secrecy = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    path = folder / f"{name}.pem"
    path.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, secrecy))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(PEM, form))
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return pair(tmp_path, "key")


def test_what_was_signed_opens(folder: Path, key: Path, tmp_path: Path) -> None:
    trusted = [pair(tmp_path, "other").with_suffix(".pub"), key.with_suffix(".pub")]
    assert signing.sign(folder, key) == folder / "model.sig"
    assert Bundle.open(folder, trusted).digest == Bundle.open(folder).digest
    signing.sign(folder, key)  # again
    assert Bundle.open(folder, trusted)


def test_a_former_signature_stays_where_signing_fails(folder: Path, key: Path) -> None:
    before = signing.sign(folder, key).read_bytes()
    (folder / "link").symlink_to("density.onnx")
    with pytest.raises(SettingsError, match="cannot be signed with"):
        signing.sign(folder, key)
    (folder / "link").unlink()
    assert (folder / "model.sig").read_bytes() == before
    assert not (folder / ".model.sig").exists()
    assert Bundle.open(folder, [key.with_suffix(".pub")])


def test_what_was_left_half_written_is_not_signed(folder: Path, key: Path) -> None:
    (folder / ".model.sig").write_text("half")
    signing.sign(folder, key)
    assert Bundle.open(folder, [key.with_suffix(".pub")])


@pytest.mark.parametrize("left_out", ["manifest.json", "density.onnx", "sub"])
def test_a_signature_leaves_nothing_out(folder: Path, key: Path, left_out: str) -> None:
    library: Any = pytest.importorskip("model_signing")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").touch()
    paths = [folder / "model.sig", folder / left_out]
    hashing = library.hashing.Config().set_ignored_paths(paths=paths)
    config = library.signing.Config().set_hashing_config(hashing)
    config.use_elliptic_key_signer(private_key=key).sign(folder, folder / "model.sig")
    obeying = library.verifying.Config()
    obeying.use_elliptic_key_verifier(public_key=key.with_suffix(".pub"))
    obeying.verify(folder, folder / "model.sig")
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder, [key.with_suffix(".pub")])
    assert caught.value.reason == "signature"


@pytest.mark.parametrize("curve", [ec.SECP384R1, ec.SECP521R1])
def test_other_curves_and_encrypted_keys_sign(folder: Path, tmp_path: Path, curve: Any) -> None:
    key = pair(tmp_path, "secret", curve, b"open sesame")
    signing.sign(folder, key, password="open sesame")
    assert Bundle.open(folder, [key.with_suffix(".pub")])
    with pytest.raises(SettingsError, match="cannot be signed with"):
        signing.sign(folder, key, password="wrong")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def relabel(folder: Path) -> None:
    """Another bundle that is whole in itself: only the signature can tell."""
    text = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    fields = {key: value for key, value in text.items() if key != "files"}
    write_manifest(folder, {**fields, "description": "mine"})
    assert Bundle.open(folder)


def forge(folder: Path) -> None:
    """The envelope's payload changed, its signature kept."""
    document = json.loads((folder / "model.sig").read_text())
    payload = document["dsseEnvelope"]["payload"]
    other = "A" if payload[40] != "A" else "B"
    document["dsseEnvelope"]["payload"] = payload[:40] + other + payload[41:]
    (folder / "model.sig").write_text(json.dumps(document))


def link_signature(folder: Path) -> None:
    (folder / "model.sig").rename(folder.parent / "elsewhere")
    (folder / "model.sig").symlink_to(folder.parent / "elsewhere")


HARMS: dict[str, Callable[[Path], object]] = {
    "no signature": lambda folder: (folder / "model.sig").unlink(),
    "another manifest": lambda folder: append(folder / "manifest.json"),
    "another whole bundle": relabel,
    "another graph": lambda folder: append(folder / "density.onnx"),
    "a file added": lambda folder: (folder / "added.txt").write_text("x"),
    "a hidden file added": lambda folder: (folder / ".gitignore").write_text("x"),
    "a file missing": lambda folder: (folder / "golden.npz").unlink(),
    "a link": lambda folder: (folder / "link.npz").symlink_to(folder / "golden.npz"),
    "no JSON": lambda folder: (folder / "model.sig").write_bytes(b"\0"),
    "another JSON": lambda folder: (folder / "model.sig").write_text("{}"),
    "a forged envelope": forge,
    "a huge one": lambda folder: (folder / "model.sig").write_bytes(b" " * (2 << 20)),
    "a linked one": link_signature,
}


def enlarge(path: Path, size: int = 20 << 30) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.truncate(size)


def enlarge_half(folder: Path) -> None:
    """Signed files that the manifest does not name, each within the limit."""
    for name in ("LICENSE", "README"):
        enlarge(folder / name, 5 << 30)


SPARSE: dict[str, Callable[[Path], object]] = {
    "a file added": lambda folder: enlarge(folder / "added"),
    "a small file added": lambda folder: enlarge(folder / "added", 1),
    "in a subfolder": lambda folder: enlarge(folder / "s" / "x", 9),
    "a graph": lambda folder: enlarge(folder / "density.onnx"),
    "the manifest": lambda folder: enlarge(folder / MANIFEST, 7 << 30),
    "the signature": lambda folder: enlarge(folder / "model.sig"),
    "a signed file that the manifest does not name": lambda folder: enlarge(folder / "README"),
    "several": enlarge_half,
}


@pytest.mark.parametrize("harm", SPARSE)
def test_what_need_not_be_hashed_is_not(
    folder: Path, key: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import model_signing

    for name in ("LICENSE", "README"):
        (folder / name).write_text("x")
    signing.sign(folder, key)
    assert Bundle.open(folder, [key.with_suffix(".pub")])
    SPARSE[harm](folder)

    def hashed(*_: object, **__: object) -> None:
        pytest.fail("files are hashed")

    monkeypatch.setattr(model_signing.hashing.Config, "hash", hashed)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder, [key.with_suffix(".pub")])
    assert caught.value.reason == "signature"


@pytest.mark.parametrize("harm", HARMS)
def test_what_was_not_signed_does_not_open(folder: Path, key: Path, harm: str) -> None:
    signing.sign(folder, key)
    HARMS[harm](folder)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder, [key.with_suffix(".pub")])
    assert caught.value.reason == "signature"
    assert "\n" not in str(caught.value)


def test_a_key_that_is_not_trusted_does_not_count(folder: Path, key: Path, tmp_path: Path) -> None:
    signing.sign(folder, pair(tmp_path, "stranger"))
    with pytest.raises(BundleError, match="not signed by a trusted key"):
        Bundle.open(folder, [key.with_suffix(".pub")])


def test_a_key_that_is_none_is_one_sentence(folder: Path, key: Path, tmp_path: Path) -> None:
    signing.sign(folder, key)
    (tmp_path / "none.pub").write_text("no key")
    for path in (tmp_path / "none.pub", tmp_path / "missing.pub"):
        with pytest.raises(SettingsError, match="no key or certificate"):
            Bundle.open(folder, [path])


def certificate(folder: Path, name: str, signer: Any = None, *, ca: bool) -> tuple[Path, Any]:
    """A certificate and its key; signed by itself where there is no signer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer, issuer_key = (signer[0].subject, signer[1]) if signer else (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
        )
        .sign(issuer_key, hashes.SHA256())
    )
    path = folder / f"{name}.crt"
    path.write_bytes(made.public_bytes(PEM))
    secret = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.with_suffix(".pem").write_bytes(secret)
    return path, (made, key)


def test_a_certificate_signs_for_its_authority(folder: Path, tmp_path: Path) -> None:
    root, authority = certificate(tmp_path, "authority", ca=True)
    leaf, _ = certificate(tmp_path, "signer", authority, ca=False)
    other, _ = certificate(tmp_path, "stranger", ca=True)
    signing.sign(folder, leaf.with_suffix(".pem"), certificate=leaf, chain=[root])
    assert Bundle.open(folder, [root])
    with pytest.raises(BundleError, match="not signed by a trusted key"):
        Bundle.open(folder, [other])


def test_the_commands_sign_and_verify(folder: Path, key: Path) -> None:
    export = pytest.importorskip("likely_export.cli")
    run = CliRunner().invoke
    public = str(key.with_suffix(".pub"))
    plain = run(main, ["verify", str(folder)])
    assert plain.exit_code == 0
    assert "toy@1.0 is whole" in plain.stdout
    unsigned = run(main, ["verify", str(folder), "--public-key", public])
    assert unsigned.exit_code == 1
    assert "has no model.sig" in unsigned.stderr
    signed = run(export.main, ["sign", str(folder), "--private-key", str(key)])
    assert signed.exit_code == 0, signed.output
    assert run(main, ["verify", str(folder), "--public-key", public]).exit_code == 0
    append(folder / "density.onnx")
    assert run(main, ["verify", str(folder)]).exit_code == 1


def test_a_server_opens_what_a_trusted_key_signed(
    running: Running, folder: Path, key: Path
) -> None:
    trusted = {"bundles": (folder,), "require_signature": (key.with_suffix(".pub"),)}
    with pytest.raises(BundleError, match=r"has no model\.sig"), running(**trusted):
        pass
    signing.sign(folder, key)
    with running(**trusted) as live:
        assert live.server.registry.has_model("toy")
