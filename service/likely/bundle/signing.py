"""Signatures of bundles, by OpenSSF model signing: `model.sig` covers every file of the folder.

The library has many dependencies that a server without signatures does not need. It is therefore
the extra `likely[signing]`, and is imported only when something is signed or verified. Nothing
here uses the network: signatures are made with a key, or with a certificate of one's own authority.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from likely.errors import BundleError, SettingsError

SIGNATURE = "model.sig"
LARGEST_SIGNATURE = 1 << 20
_MISSING_LIBRARY = "signatures need the library model-signing: pip install 'likely[signing]'"
_CERTIFICATE_HEADER = b"-----BEGIN CERTIFICATE-----"


def sign(
    folder: Path,
    private_key: Path,
    *,
    password: str | None = None,
    certificate: Path | None = None,
    chain: Sequence[Path] = (),
) -> Path:
    """Signs a bundle; returns the path of the signature's file.

    The file is written by rename, so that an earlier signature stays if this fails.

    Args:
        folder: the complete bundle.
        private_key: PEM file of a key on an elliptic curve (P-256, P-384 or P-521).
        password: the password of the key, if it is encrypted.
        certificate: PEM file; if given, the signature names this certificate, and is verified
            with the certificate's authority.
        chain: PEM files of the intermediate authorities.

    Raises:
        SettingsError: the library is not installed, or a key cannot be used.
    """
    library = _import_library()
    path = folder / SIGNATURE
    temporary = folder / f".{SIGNATURE}"
    config = library.signing.Config().set_hashing_config(_hashing_config(library))
    try:
        if certificate is None:
            config.use_elliptic_key_signer(
                private_key=private_key, password=_encode_password(password)
            )
        else:
            config.use_certificate_signer(
                private_key=private_key, signing_certificate=certificate, certificate_chain=chain
            )
        temporary.unlink(missing_ok=True)
        if path.is_symlink():  # not a signature; the library signs no folder with links
            path.unlink()
        config.sign(folder, temporary)
        temporary.replace(path)
    except Exception as error:  # the library lets errors of its own libraries pass
        raise SettingsError(f"{folder} cannot be signed with {private_key}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def verify(folder: Path, trusted: Sequence[Path]) -> None:
    """Checks that one of the trusted keys signed everything in the folder.

    Args:
        folder: the bundle.
        trusted: PEM files, each a public key or the certificates of an authority.

    Raises:
        BundleError: with reason `signature`: there is no signature, none of the keys made it, or
            a file was changed, removed or added since.
        SettingsError: the library is not installed, or a trusted file cannot be read.
    """
    library = _import_library()
    path = folder / SIGNATURE
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{folder} has no {SIGNATURE}, but must be signed", "signature")
    if path.stat().st_size > LARGEST_SIGNATURE:
        raise BundleError(f"{path} has more than {LARGEST_SIGNATURE} bytes", "signature")
    _check_all_signed(folder)
    failures = []
    for key in trusted:
        hashing = _hashing_config(library)
        hashing.add_ignored_paths = _ignore_exclusions  # exclusions that a signature itself names
        config = library.verifying.Config().set_hashing_config(hashing)
        try:
            pem = key.read_bytes()
            if pem.lstrip().startswith(_CERTIFICATE_HEADER):
                config.use_certificate_verifier(certificate_chain=[key])
            else:
                config.use_elliptic_key_verifier(public_key=key)
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(f"{key} is no key or certificate to trust: {error}") from error
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the library prints its warnings
                config.verify(folder, path)
        except Exception as error:  # any error means that the signature is not valid
            failures.append(f"{key}: {' '.join(str(error).split())[:300] or type(error).__name__}")
        else:
            return
    raise BundleError(f"{folder} is not signed by a trusted key", "signature", "; ".join(failures))


def _check_all_signed(folder: Path) -> None:
    """Checks that the signature names every file, so that no other file is hashed.

    The signature itself is not trusted yet.

    Raises:
        BundleError: the signature cannot be read, or does not name a file.
    """
    try:
        envelope = json.loads((folder / SIGNATURE).read_bytes())["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        names = {SIGNATURE, *(one["name"] for one in statement["predicate"]["resources"])}
    except OSError as error:
        raise BundleError.unreadable(folder / SIGNATURE, error) from error
    except Exception as error:  # any error means that it is not a valid signature
        raise BundleError(f"{folder / SIGNATURE} is no signature", "signature") from error
    for entry in folder.rglob("*"):
        name = entry.relative_to(folder).as_posix()
        if name not in names and (entry.is_symlink() or not entry.is_dir()):
            raise BundleError(f"{entry} is not among the files that were signed", "signature")


def _import_library() -> Any:
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise SettingsError(f"{_MISSING_LIBRARY} ({error})") from error
    return model_signing


def _hashing_config(library: Any) -> Any:
    """Covers every file except the signature itself, also a `.gitignore`."""
    return library.hashing.Config().set_ignored_paths(
        paths=[Path(SIGNATURE)], ignore_git_paths=False
    )


def _ignore_exclusions(**_: object) -> None:
    """Ignores a request to exclude more paths."""


def _encode_password(password: str | None) -> Any:
    return None if password is None else password.encode()
