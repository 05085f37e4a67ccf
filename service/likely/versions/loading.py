"""Loads an engine from a bundle's folder and checks that it reproduces its golden outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from likely import graphs, machine
from likely.batching.admission import Bounds
from likely.batching.traffic import Traffic
from likely.bundle import MANIFEST, Bundle, read_manifest
from likely.engine import Engine, Seen, Terms
from likely.errors import BundleError, LikelyError, SettingsError
from likely.settings import Settings


class Loader:
    """Opens bundles according to the settings; may be used from any thread."""

    def __init__(self, settings: Settings, traffic: Traffic, seen: Seen) -> None:
        self._settings = settings
        self._traffic = traffic
        self._terms = Terms(
            settings.lanes,
            Bounds(settings.queued_images, settings.queued_bytes),
            settings.withheld_answers,
            seen,
        )
        self._device = graphs.Device.parse(settings.device, memory=settings.gpu_memory << 20)
        cores = machine.cores()
        self._threads = settings.threads or max(1, cores // (settings.workers or cores))

    def read_identity(self, folder: Path) -> tuple[str, str]:
        """Returns the name and version in a folder's manifest, without checking the bundle.

        Raises:
            BundleError: the manifest cannot be read as one.
        """
        with refusing(folder):
            manifest = read_manifest(folder)
        return manifest.name, manifest.version

    def verify(self, folder: Path) -> Bundle:
        """Opens the bundle in a folder and checks everything that needs no runtime.

        Raises:
            BundleError: the bundle is refused.
            SettingsError: the bundle's calibration is too small for the default alpha.
        """
        with refusing(folder):
            bundle = Bundle.open(folder, self._settings.require_signature)
        alpha, calibration = self._settings.default_alpha, bundle.manifest.calibration
        if calibration and alpha < (finest := calibration.finest_alpha):
            raise SettingsError(
                f"default_alpha = {alpha:g} is finer than {finest:.6g}, "
                f"the finest that {folder} can promise"
            )
        return bundle

    def load(self, bundle: Bundle) -> Engine:
        """Opens the engine of a verified bundle, replays the golden outputs and warms it up.

        Raises:
            BundleError: the bundle is refused, or its files have changed in the meantime.
            DeviceError: the requested device is not available, or fails.
            DeviceLost: the device can no longer run anything.
            OutOfMemory: there is not enough memory.
        """
        with refusing(bundle.path):
            engine = Engine.load(
                bundle,
                device=self._device,
                threads=self._threads,
                max_batch=self._settings.max_batch,
                terms=self._terms,
                traffic=self._traffic,
            )
        try:
            bundle.check_again()  # makes sure that the opened files are the verified ones
        except BaseException:
            engine.close()
            raise
        return engine


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turns any exception that a bundle's content causes in a library into a refusal.

    Golden inputs, for example, can make a runtime raise anything. `LikelyError`, `OSError` and
    `MemoryError` pass unchanged.

    Raises:
        BundleError: a library raised some other exception.
        DeviceError: a card caused the exception, which is not the bundle's fault.
    """
    try:
        yield
    except (LikelyError, OSError, MemoryError):
        raise
    except Exception as error:
        if fault := graphs.device_fault(error):
            raise fault from error
        said = f"{type(error).__name__}: {error}"[:500]
        raise BundleError(f"{folder} cannot be loaded", "graph", said) from error


def shipped() -> Sequence[Path]:
    """Returns the folders of the bundles inside the package.

    Raises:
        BundleError: the package contains none.
    """
    shelf = Path(str(resources.files("likely"))) / "bundles"
    if folders := sorted(manifest.parent for manifest in shelf.glob(f"*/{MANIFEST}")):
        return folders
    raise BundleError(f"{shelf} holds no bundle; name one by --bundle")
