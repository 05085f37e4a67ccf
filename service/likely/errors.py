"""Every error that likely raises, in one tree.

    LikelyError
    ├── InvalidInput          a value outside what is allowed; names the field
    ├── ModelNotFound         no such model or version is served
    ├── NotAnswered           the model has no graph for this question
    ├── Overloaded            try again later; carries a delay where one is known
    ├── Unavailable           the server cannot be reached or is going away; likewise
    ├── DeadlineExceeded      no answer in time
    ├── AccessDenied          a valid token that does not allow this
    │   └── Unauthenticated   no token, or none that is valid; carries the reason
    ├── MethodUnknown         the server has no such method: older than its client, or another
    ├── Forked                a client whose channel another process opened
    ├── ServerFault           the server failed; carries its request id
    ├── BundleError           a bundle is incomplete, altered or foreign
    ├── Refused               a change of what is served that may not be made now
    ├── DeviceError           the device asked for is not really there
    ├── DeviceLost            the device that served is gone; only a restart helps
    ├── OutOfMemory           the runtime found no memory for a batch
    ├── RunStopped            a run was ended because nobody waits for it
    ├── RuntimeMissing        no ONNX Runtime is installed
    ├── JobError              a batch job that cannot be done, or resumed, as it was asked for
    └── SettingsError         settings that cannot be used

`Client` and `AsyncClient` raise those up to ServerFault, as the server's status says, and
SettingsError for what they are made with; `AdminClient` raises BundleError, Refused and
DeviceError too. OutOfMemory and RunStopped stay within a server, JobError within a job. DeviceLost,
RuntimeMissing and SettingsError end `likely serve`; so do BundleError and DeviceError while its
first bundles load.
"""

from __future__ import annotations


class LikelyError(Exception):
    """The root: everything that likely raises on purpose."""

    @property
    def told(self) -> str:
        """What callers of a server read of it."""
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

    def __reduce__(self) -> tuple[type[ModelNotFound], tuple[str, str]]:
        """Rebuilt from both arguments where it crosses a process."""
        return type(self), (self.resource, str(self))


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
    """The server cannot be reached or is going away.

    Attributes:
        retry_after: seconds after which a retry makes sense, where the server said so.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(LikelyError, TimeoutError):
    """No answer came in time."""


class AccessDenied(LikelyError, PermissionError):
    """The token is valid, and does not allow this."""


class Unauthenticated(AccessDenied):
    """The server wants a token, or a valid one.

    Attributes:
        reason: one of TOKEN_MISSING, TOKEN_INVALID and TOKEN_EXPIRED.
    """

    def __init__(self, message: str, reason: str = "TOKEN_INVALID") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[Unauthenticated], tuple[str, str]]:
        """Rebuilt from both arguments where it crosses a process."""
        return type(self), (str(self), self.reason)


class MethodUnknown(LikelyError):
    """The server has no such service or method."""


class Forked(LikelyError, RuntimeError):
    """A client is used in another process than the one that opened its channel."""


class ServerFault(LikelyError):
    """The server failed; its log tells why under the request id in the message."""


class BundleError(LikelyError):
    """A bundle is incomplete, altered or foreign, and is refused.

    Attributes:
        message: what is wrong, in likely's own words.
        reason: the kind of fault in one word, as metrics count it.
        beneath: what a library said of it, for the log and the shell.
    """

    def __init__(self, message: str, reason: str = "refused", beneath: str = "") -> None:
        super().__init__(f"{message}: {beneath}" if beneath else message)
        self.message = message
        self.reason = reason
        self.beneath = beneath

    @classmethod
    def unreadable(cls, path: object, error: OSError) -> BundleError:
        """What says that a file of it cannot be read now, which may pass."""
        return cls(f"{path} cannot be read: {error.strerror}", "unreadable")

    @property
    def told(self) -> str:
        """The message alone: what a library said stays in the log."""
        return self.message

    def __reduce__(self) -> tuple[type[BundleError], tuple[str, str, str]]:
        """Rebuilt from all arguments where it crosses a process."""
        return type(self), (self.message, self.reason, self.beneath)


class Refused(LikelyError):
    """What is served stays as it is: a change was asked for that the server may not make now."""


class DeviceError(LikelyError):
    """The device asked for is not really there."""


class DeviceLost(LikelyError):
    """The device that served can run nothing any more; a new process may."""


class OutOfMemory(LikelyError, MemoryError):
    """The runtime found no memory for a batch; a smaller one may run."""


class RunStopped(LikelyError):
    """A run was ended before it had an answer, because nobody waits for it."""


class RuntimeMissing(LikelyError, ImportError):
    """No ONNX Runtime is installed."""


class JobError(LikelyError):
    """A batch job that cannot be done, or resumed, as it was asked for."""


class SettingsError(LikelyError):
    """Settings that cannot be used."""
