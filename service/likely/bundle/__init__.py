"""Bundles: their manifest, what their files may be, their signatures; refused before opened."""

from likely.bundle.manifest import (
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
