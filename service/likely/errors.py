"""Every error that likely raises, in one tree.

    LikelyError
    ├── InvalidInput          a value outside what is allowed; names the field
    ├── ModelNotFound         no such model or version is served
    ├── NotAnswered           the model has no graph for this question
    ├── Overloaded            try again later; carries a delay where one is known
    ├── Unavailable           the server cannot be reached or is going away
    ├── DeadlineExceeded      no answer in time
    ├── AccessDenied          no valid credentials, or not enough of them
    ├── ServerFault           the server failed; carries its request id
    ├── BundleError           a bundle is incomplete, altered or foreign
    ├── DeviceError           the device asked for is not really there
    ├── RuntimeMissing        no ONNX Runtime is installed
    └── SettingsError         settings that cannot be used

The engine raises the first three; the client raises all up to ServerFault, as
the server's status says; the others end `likely serve` before it says that it serves.
"""

from __future__ import annotations


class LikelyError(Exception):
    """The root: everything that likely raises on purpose."""


class InvalidInput(LikelyError, ValueError):
    """A value outside what is allowed.

    Attributes:
        field: path of the offending field in the request, such as `images.shape`.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.description = message

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str]]:
        """Rebuilt from both arguments where it crosses a process."""
        return type(self), (self.field, self.description)


class ModelNotFound(LikelyError, LookupError):
    """No such model or version is served.

    Attributes:
        resource: the name asked for, `name` or `name@version`.
    """

    def __init__(self, resource: str, message: str) -> None:
        super().__init__(message)
        self.resource = resource


class NotAnswered(LikelyError):
    """The model has no graph for this question."""


class Overloaded(LikelyError):
    """The server sheds load.

    Attributes:
        retry_after: seconds after which a retry makes sense, where known.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(LikelyError, ConnectionError):
    """The server cannot be reached or is going away."""


class DeadlineExceeded(LikelyError, TimeoutError):
    """No answer came in time."""


class AccessDenied(LikelyError, PermissionError):
    """The server wants credentials, or other ones."""


class ServerFault(LikelyError):
    """The server failed; its log tells why under the request id in the message."""


class BundleError(LikelyError):
    """A bundle is incomplete, altered or foreign, and is refused."""


class DeviceError(LikelyError):
    """The device asked for is not really there."""


class RuntimeMissing(LikelyError, ImportError):
    """No ONNX Runtime is installed."""


class SettingsError(LikelyError):
    """Settings that cannot be used."""
