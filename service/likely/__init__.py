"""likely: explicit-density models over gRPC. This package exports the client.

    from likely import Client

    with Client("127.0.0.1:50051") as client:
        scores = client.score(images, alpha=0.01)

Importing it imports neither onnxruntime nor anything else that only a server needs.
"""

from likely.answers import (
    Classifications,
    Completions,
    Draws,
    Features,
    Guarantee,
    LabelRule,
    Limits,
    ModelInfo,
    ModelVersion,
    Redrawings,
    Scores,
    Traversal,
    Verdict,
    VersionState,
)
from likely.client import AdminClient, AsyncClient, Client
from likely.errors import (
    AccessDenied,
    BundleError,
    DeadlineExceeded,
    DeviceError,
    Forked,
    InvalidInput,
    LikelyError,
    ModelNotFound,
    NotAnswered,
    Overloaded,
    Refused,
    RuntimeMissing,
    ServerFault,
    SettingsError,
    Unavailable,
)
from likely.outliers import benjamini_hochberg

__all__ = [
    "AccessDenied",
    "AdminClient",
    "AsyncClient",
    "BundleError",
    "Classifications",
    "Client",
    "Completions",
    "DeadlineExceeded",
    "DeviceError",
    "Draws",
    "Features",
    "Forked",
    "Guarantee",
    "InvalidInput",
    "LabelRule",
    "LikelyError",
    "Limits",
    "ModelInfo",
    "ModelNotFound",
    "ModelVersion",
    "NotAnswered",
    "Overloaded",
    "Redrawings",
    "Refused",
    "RuntimeMissing",
    "Scores",
    "ServerFault",
    "SettingsError",
    "Traversal",
    "Unavailable",
    "Verdict",
    "VersionState",
    "benjamini_hochberg",
]
