"""From a folder to an engine that has proved itself."""

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
    """Opens bundles as the settings want it; may be used from any thread."""

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

    def claimed(self, folder: Path) -> tuple[str, str]:
        """Name and version that a folder's manifest tells, whether the bundle is sound or not.

        Raises:
            BundleError: it tells none.
        """
        with refusing(folder):
            manifest = read_manifest(folder)
        return manifest.name, manifest.version

    def verified(self, folder: Path) -> Bundle:
        """The bundle in that folder, checked in all that needs no runtime.

        Raises:
            BundleError: it is refused.
            SettingsError: it cannot promise the default alpha.
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

    def proved(self, bundle: Bundle) -> Engine:
        """The engine of a verified bundle, warm, after it gave its golden outputs.

        Raises:
            BundleError: it is refused, or was changed meanwhile.
            DeviceError: the device asked for is not really there, or fails.
            DeviceLost: it can run nothing any more.
            OutOfMemory: there is no memory for it.
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
            bundle.check_again()  # what was opened is what was verified
        except BaseException:
            engine.close()
            raise
        return engine


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Refuses a bundle whatever its content makes a library raise, as golden inputs may.

    Raises:
        BundleError: something that is neither likely's own nor the system's was raised.
        DeviceError: or so it was by a card, which is no fault of the bundle.
    """
    try:
        yield
    except (LikelyError, OSError, MemoryError):
        raise
    except Exception as error:
        if fault := graphs.device_fault(error):
            raise fault from error
        said = f"{type(error).__name__}: {error}"[:500]
        raise BundleError(f"{folder} cannot be tried", "graph", said) from error


def shipped() -> Sequence[Path]:
    """The folders of the bundles inside the package.

    Raises:
        BundleError: there is none.
    """
    shelf = Path(str(resources.files("likely"))) / "bundles"
    if found := sorted(manifest.parent for manifest in shelf.glob(f"*/{MANIFEST}")):
        return found
    raise BundleError(f"{shelf} holds no bundle; name one by --bundle")
