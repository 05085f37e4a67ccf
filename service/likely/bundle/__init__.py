"""Bundles: their manifest, what their files may be, their signatures; refused before opened."""

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
