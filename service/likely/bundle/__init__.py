"""Bundles: manifest, checks of every file, and signatures; nothing is opened before its check."""

from likely.bundle.folder import (
    LARGEST_MANIFEST,
    MANIFEST,
    Bundle,
    read_manifest,
    write_manifest,
)
from likely.bundle.manifest import (
    Graph,
    Kind,
    Latent,
    Manifest,
    Name,
    Role,
    TensorSpec,
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
