"""Every error that likely raises, in one tree.

    LikelyError
    ├── InvalidInput          a value outside what is allowed; names the field
    ├── ModelNotFound         no such model or version is served
    ├── NotAnswered           the model has no graph for this question
    ├── Overloaded            try again later; carries a delay where one is known
    ├── Unavailable           the server cannot be reached or is shutting down; likewise
    ├── DeadlineExceeded      no answer in time
    ├── AccessDenied          a valid token that does not allow this
    │   └── Unauthenticated   no token, or none that is valid; carries the reason
    ├── MethodUnknown         the server has no such method: it may be older than the client
    ├── Forked                a client is used in a process that did not open its channel
    ├── ServerFault           the server failed; carries its request id
    ├── BundleError           a bundle is incomplete, altered or foreign
    ├── Refused               what is served cannot be changed in this way now
    ├── DeviceError           the requested device is not available
    ├── DeviceLost            the device in use is gone; only a restart helps
    ├── OutOfMemory           the runtime found no memory for a batch
    ├── RunStopped            a run was stopped because nobody waits for it
    ├── RuntimeMissing        no ONNX Runtime is installed
    ├── JobError              a batch job cannot be done, or resumed, as requested
    └── SettingsError         settings that cannot be used

`Client` and `AsyncClient` raise the errors up to ServerFault, depending on the server's status, and
SettingsError for invalid arguments of their constructors. `AdminClient` also raises BundleError,
Refused and DeviceError. OutOfMemory and RunStopped do not leave a server, and JobError does not
leave a job. DeviceLost, RuntimeMissing and SettingsError end `likely serve`; so do BundleError and
DeviceError while its first bundles load.
"""

from __future__ import annotations


class LikelyError(Exception):
    """The base class of all errors that likely raises on purpose."""

    @property
    def public_message(self) -> str:
        """The text that callers of a server get."""
        return str(self)


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
        """Pickles the error with both its arguments."""
        return type(self), (self.field, self.description)


class ModelNotFound(LikelyError, LookupError):
    """No such model or version is served.

    Attributes:
        resource: the name asked for, `name` or `name@version`.
    """

    def __init__(self, resource: str, message: str) -> None:
        super().__init__(message)
        self.resource = resource

    def __reduce__(self) -> tuple[type[ModelNotFound], tuple[str, str]]:
        """Pickles the error with both its arguments."""
        return type(self), (self.resource, str(self))


class NotAnswered(LikelyError):
    """The model has no graph for this question."""


class Overloaded(LikelyError):
    """The server refuses the request because of its load.

    Attributes:
        retry_after: seconds after which a retry makes sense; None if unknown.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(LikelyError, ConnectionError):
    """The server cannot be reached or is shutting down.

    Attributes:
        retry_after: seconds after which a retry makes sense; None if the server did not say.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(LikelyError, TimeoutError):
    """No answer came in time."""


class AccessDenied(LikelyError, PermissionError):
    """The token is valid, but does not allow this."""


class Unauthenticated(AccessDenied):
    """The token is missing or invalid.

    Attributes:
        reason: one of TOKEN_MISSING, TOKEN_INVALID and TOKEN_EXPIRED.
    """

    def __init__(self, message: str, reason: str = "TOKEN_INVALID") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[Unauthenticated], tuple[str, str]]:
        """Pickles the error with both its arguments."""
        return type(self), (str(self), self.reason)


class MethodUnknown(LikelyError):
    """The server has no such service or method."""


class Forked(LikelyError, RuntimeError):
    """A client is used in a process that did not open its channel."""


class ServerFault(LikelyError):
    """The server failed; its log has the cause under the request id in the message."""


class BundleError(LikelyError):
    """A bundle is incomplete, altered or foreign, and is refused.

    Attributes:
        message: what is wrong, in likely's own words.
        reason: the kind of fault in one word, as metrics count it.
        beneath: the message of a library, for the log and the shell; empty if there is none.
    """

    def __init__(self, message: str, reason: str = "refused", beneath: str = "") -> None:
        super().__init__(f"{message}: {beneath}" if beneath else message)
        self.message = message
        self.reason = reason
        self.beneath = beneath

    @classmethod
    def unreadable(cls, path: object, error: OSError) -> BundleError:
        """The error for a file that cannot be read now, which may be temporary."""
        return cls(f"{path} cannot be read: {error.strerror}", "unreadable")

    @property
    def public_message(self) -> str:
        """The message alone: the library's message stays in the log."""
        return self.message

    def __reduce__(self) -> tuple[type[BundleError], tuple[str, str, str]]:
        """Pickles the error with all its arguments."""
        return type(self), (self.message, self.reason, self.beneath)


class Refused(LikelyError):
    """The server cannot make the requested change now; what it serves stays as it is."""


class DeviceError(LikelyError):
    """The requested device is not available."""


class DeviceLost(LikelyError):
    """The device in use can no longer run anything; a new process may be able to use it."""


class OutOfMemory(LikelyError, MemoryError):
    """The runtime found no memory for a batch; a smaller batch may run."""


class RunStopped(LikelyError):
    """A run was stopped before it had an answer, because nobody waits for it."""


class RuntimeMissing(LikelyError, ImportError):
    """No ONNX Runtime is installed."""


class JobError(LikelyError):
    """A batch job cannot be done, or resumed, as requested."""


class SettingsError(LikelyError):
    """Settings that cannot be used."""
