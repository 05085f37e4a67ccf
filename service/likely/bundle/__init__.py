"""Bundles: manifest, checks of every file, and signatures; nothing is opened before its check."""

from likely.bundle.manifest import (
    LARGEST_MANIFEST,
    MANIFEST,
    Bundle,
    Graph,
    Kind,
    Latent,
    Manifest,
    Name,
    Role,
    TensorSpec,
    read_manifest,
    write_manifest,
)

__all__ = [
    "LARGEST_MANIFEST",
    "MANIFEST",
    "Bundle",
    "Graph",
    "Kind",
    "Latent",
    "Manifest",
    "Name",
    "Role",
    "TensorSpec",
    "read_manifest",
    "write_manifest",
]
