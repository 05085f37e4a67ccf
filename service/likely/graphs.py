"""The only module that uses ONNX Runtime: devices, sessions, and runs of a graph.

If `cuda` is requested and not available, that is an error, never a silent
fallback. What is available is what the opened session reports, not the list of
providers that the installed package was built with.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from likely import machine
from likely.bundle import Graph, TensorSpec
from likely.errors import (
    BundleError,
    DeviceError,
    DeviceLost,
    LikelyError,
    OutOfMemory,
    RunStopped,
    RuntimeMissing,
    SettingsError,
)

Array = npt.NDArray[Any]
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# ONNX Runtime's errors of these kinds differ only in their text.
_STOPPED = re.compile(r"terminate flag")
# The last two come from an arena that has reached its limit.
_NO_MEMORY = re.compile(
    r"[Ff]ailed to allocate|bad_alloc|out of memory|MEMORY_ALLOC|ALLOC(?:ATION)?_FAILED|"
    r"CUDA failure 2:|CUBLAS failure 3:|bad allocation|Available memory of \d+ is smaller|"
    r"[Ff]ailed to find a free memory block"
)
# The name of a card's library, which the runtime puts before the library's message.
_LIBRARY_ERROR = re.compile(r"\bCU[A-Z_]+ (?:failure|error)\b")
_NO_CUDNN = re.compile(r"cuDNN is (?:unavailable|not available)")
_NO_LIBRARIES = re.compile(r"CUDA wasn'?t able to be loaded")
# CUDA errors (cudaError_t in the CUDA runtime's manual) that mean that the card is gone, or that
# leave the process's CUDA context unusable: by number, as a failed call reports them, and by name,
# as a failed launch of a kernel does. Errors of cuDNN and cuBLAS do not show whether the context
# is lost; if it is, the next run fails with one of these.
_CARD_GONE_ERRORS = {46: "DevicesUnavailable", 100: "NoDevice"}
_CONTEXT_LOST_ERRORS = {
    214: "ECCUncorrectable",
    226: "Contained",
    700: "IllegalAddress",
    702: "LaunchTimeout",
    709: "ContextIsDestroyed",
    710: "Assert",
    714: "HardwareStackError",
    715: "IllegalInstruction",
    716: "MisalignedAddress",
    717: "InvalidAddressSpace",
    718: "InvalidPc",
    719: "LaunchFailure",
    721: "TensorMemoryLeak",
    810: "MpsClientTerminated",
    911: "ExternalDevice",
    999: "Unknown",
}


def _error_pattern(errors: Mapping[int, str]) -> re.Pattern[str]:
    numbers, names = "|".join(map(str, errors)), "|".join(errors.values())
    return re.compile(rf"CUDA failure (?:{numbers})\b|CUDA error cudaError(?:{names})\b")


_CONTEXT_LOST, _CARD_LOST = (
    _error_pattern(_CONTEXT_LOST_ERRORS),
    _error_pattern(_CARD_GONE_ERRORS | _CONTEXT_LOST_ERRORS),
)
_PRELOAD_LOCK = Lock()


@dataclass(frozen=True, slots=True)
class Device:
    """Where graphs run: `cpu`, `cuda[:index]`, or `auto` for CUDA if it is available.

    Attributes:
        kind: the kind of device.
        index: the number of the card.
        memory: bytes of the card's memory that each graph's arena may take; 0 for no limit.
    """

    kind: Literal["auto", "cpu", "cuda"]
    index: int = 0
    memory: int = 0

    @classmethod
    def parse(cls, text: str, memory: int = 0) -> Device:
        """Parses the name of a device.

        Args:
            text: `auto`, `cpu`, `cuda`, or `cuda:` and the number of a card.
            memory: bytes of the card's memory that each graph's arena may take; 0 for no limit.

        Raises:
            SettingsError: the text is none of these.
        """
        match text:
            case "auto" | "cpu" | "cuda":
                return cls(text, memory=memory)
        if match := re.fullmatch(r"cuda:(\d{1,2})", text):
            return cls("cuda", int(match[1]), memory)
        raise SettingsError(f"device {text!r} is none of auto, cpu, cuda, cuda:0, cuda:1, …")

    def resolve(self) -> Device:
        """The device with `auto` resolved: CUDA if runtime and driver have it, else the CPU."""
        if self.kind != "auto":
            return self
        there = CUDA in runtime().get_available_providers() and cuda_devices() > 0
        return replace(self, kind="cuda" if there else "cpu")

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.kind == "cuda" else self.kind


def require_runtime() -> None:
    """Checks that an ONNX Runtime is installed.

    Raises:
        RuntimeMissing: none is; the message names the extras that install one.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise RuntimeMissing(f"no ONNX Runtime is installed; {machine.INSTALL}")


def cuda_devices() -> int:
    """The number of cards that the NVIDIA driver reports; 0 if there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


class Stop:
    """Stops, from another thread, every run that it is passed to; it cannot be reset."""

    def __init__(self) -> None:
        self.options = runtime().RunOptions()

    def now(self) -> None:
        """Stops the runs at their next node."""
        self.options.terminate = True


class Session:
    """One opened graph; `run` may be called from several threads at once.

    Attributes:
        spec: the graph's inputs and outputs as the manifest names them.
        providers: the execution providers that the session itself reports.
    """

    def __init__(
        self,
        path: Path,
        spec: Graph,
        device: Device,
        threads: int = 1,
        weights: Mapping[str, bytes] | None = None,
    ) -> None:
        """Opens the graph.

        Args:
            path: the ONNX file.
            spec: the manifest's description of the graph.
            device: where the graph runs.
            threads: number of threads of one run; simultaneous runs share them.
            weights: by name, the contents of files beside the ONNX file that hold its weights.
                A file that is not given here is memory-mapped as long as the session exists,
                so that the weights change if the file does.

        Raises:
            BundleError: the file is no graph, or not the one that the manifest describes.
            DeviceError: the device is not available.
            DeviceLost: the card can no longer run anything.
            OutOfMemory: there is no memory for the graph.
        """
        self.spec = spec
        self._device = device.resolve()
        self._session = _open(path, self._device, threads, weights or {})
        self.providers = tuple(self._session.get_providers())
        _check_interface(path, "input", spec.inputs, self._session.get_inputs())
        _check_interface(path, "output", spec.outputs, self._session.get_outputs())

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        """Runs the graph; returns the outputs with the given names, in that order.

        Args:
            feeds: an array for each input.
            outputs: names of the graph's outputs.
            stop: can stop this run before it has an answer.

        Raises:
            RunStopped: `stop` ended the run.
            OutOfMemory: the runtime found no memory for the run; a smaller batch may run.
            DeviceLost: the card can no longer run anything.
            DeviceError: cuDNN was not found, and the graph needs it on a card.
        """
        options = stop.options if stop else None
        try:
            if self._device.kind == "cuda":
                return self.run_bound(feeds, outputs, options)
            arrays: list[Array] = self._session.run(list(outputs), dict(feeds), options)
        except Exception as error:  # ONNX Runtime raises its own types, one for each status
            raise _to_likely_error(error) from error
        return arrays

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """The outputs of a run with no rows."""
        specs = {spec.name: spec for spec in self.spec.outputs}
        return [np.empty(specs[name].array_shape(0), dtype=specs[name].dtype) for name in outputs]

    def run_bound(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], options: Any = None
    ) -> list[Array]:
        """Like `run`, but with explicit copies to and from the device, and a padded batch.

        At the first batch of each size, a card chooses kernels and grows its arena. Batches are
        therefore padded to a power of two, and the extra rows are cut off the outputs.
        """
        n = rows(feeds)
        kind, index = self._device.kind, self._device.index
        binding = self._session.io_binding()
        for name, feed in pad_rows(feeds, padded_size(n)).items():
            value = runtime().OrtValue.ortvalue_from_numpy(feed, kind, index)
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding, options)
        return [value.numpy()[:n] for value in binding.get_outputs()]


def rows(feeds: Mapping[str, Array]) -> int:
    """The number of rows of the feeds."""
    return len(next(iter(feeds.values())))


def padded_size(n: int) -> int:
    """The padded size of a batch of `n` rows: the next power of two, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def pad_rows(feeds: Mapping[str, Array], size: int) -> dict[str, Array]:
    """The feeds padded to `size` rows by repeating their last row, each contiguous in memory.

    Unlike zeros, a repeated row is an input of the kind that the graph was made for.
    """
    missing = size - rows(feeds)
    return {
        name: np.ascontiguousarray(np.concatenate([feed, np.repeat(feed[-1:], missing, 0)]))
        if missing
        else np.ascontiguousarray(feed)
        for name, feed in feeds.items()
    }


def device_fault(error: Exception) -> DeviceError | None:
    """The error as a `DeviceError`, if one of a card's libraries failed with it; else None."""
    text = str(error)
    match = _LIBRARY_ERROR.search(text)
    return DeviceError(f"the device failed: {_extract_cause(text, match)}") if match else None


def _to_likely_error(error: Exception, what: str = "the run") -> Exception:
    """The `LikelyError` that an error of the runtime means; else that error itself."""
    text = str(error)
    if _STOPPED.search(text):
        return RunStopped("the run was stopped")
    match = _NO_MEMORY.search(text)
    if match or isinstance(error, MemoryError):
        return OutOfMemory(f"no memory for {what}: {_extract_cause(text, match)}")
    if match := _CARD_LOST.search(text):
        return DeviceLost(f"the card is lost: {_extract_cause(text, match)}")
    if match := _NO_CUDNN.search(text):
        return DeviceError(
            f"cuDNN was not found ('likely[cuda]' brings it): {_extract_cause(text, match)}"
        )
    return error


def _to_opening_error(error: Exception, path: Path, device: Device) -> LikelyError:
    """The `LikelyError` that a runtime's error in opening a graph means."""
    text, failure = str(error), _to_likely_error(error, f"the graph {path}")
    if isinstance(failure, OutOfMemory):
        return failure
    if device.kind == "cuda":
        # A card that is busy or absent was never in use, so it is not lost.
        if isinstance(failure, DeviceError) or (
            isinstance(failure, DeviceLost) and _CONTEXT_LOST.search(text)
        ):
            return failure
        if match := _LIBRARY_ERROR.search(text):
            return DeviceError(
                f"device {device} was asked for, but cannot be used: {_extract_cause(text, match)}"
            )
        if _NO_LIBRARIES.search(text):
            return _missing_libraries_error(device, "the runtime cannot load CUDA")
    return BundleError(
        f"{path} is not a graph that ONNX Runtime {runtime().__version__} opens", "graph", text
    )


def _missing_libraries_error(device: Device, sign: str) -> DeviceError:
    return DeviceError(
        f"device {device} was asked for, but {sign}: the CUDA and cuDNN libraries that ONNX "
        "Runtime needs were not found ('likely[cuda]' brings them)"
    )


def _extract_cause(text: str, cause: re.Match[str] | None) -> str:
    """The cause in the text of a runtime's error, without the source locations around it."""
    begin = min(
        (match.start() for match in (cause, _LIBRARY_ERROR.search(text)) if match), default=0
    )
    return text[begin:].partition(" ; GPU=")[0][:200].strip()


@cache  # called for every batch
def runtime() -> Any:
    """Imports ONNX Runtime with telemetry off; from 1.29 on, it would report to its maker.

    Raises:
        RuntimeMissing: none is installed; the message names the extras that install one.
        ImportError: it cannot be imported.
    """
    require_runtime()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def _open(path: Path, device: Device, threads: int, weights: Mapping[str, bytes]) -> Any:
    ort = runtime()
    options = ort.SessionOptions()
    options.add_external_initializers_from_files_in_memory(
        list(weights), list(weights.values()), [len(content) for content in weights.values()]
    )
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4 if device.kind == "cuda" else 3
    # The pool's threads spin during a run, because sleeping ones would have to be woken for every
    # node. They stop after it, because spinning ones would take the cores from others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list[Any] = [CPU]
    if device.kind == "cuda":
        _check_cuda(ort, device)
        providers = [(CUDA, _cuda_options(device)), CPU]
    try:
        # With its fallback, if the card fails, the runtime would use the CPU and print that.
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises its own types, one for each status
        raise _to_opening_error(error, path, device) from error
    if device.kind == "cuda" and (runs := session.get_providers()[0]) != CUDA:
        raise _missing_libraries_error(device, f"the session runs on {runs}")
    return session


def _cuda_options(device: Device) -> dict[str, str]:
    options = {
        "device_id": str(device.index),
        # TensorFloat-32 would exceed the tolerance of the parity gate.
        "use_tf32": "0",
        # The default, EXHAUSTIVE, times every convolution for each size of batch. The first request
        # of a size would wait for that, and two servers could choose, and round, differently.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    if device.memory:
        # Growing by powers of two would request twice the memory, and fail below the limit.
        options |= {
            "gpu_mem_limit": str(device.memory),
            "arena_extend_strategy": "kSameAsRequested",
        }
    return options


def _check_cuda(ort: Any, device: Device) -> None:
    if CUDA not in ort.get_available_providers():
        raise DeviceError(
            f"device {device} was asked for, but this ONNX Runtime was built without CUDA: "
            "install 'likely[gpu]' or 'likely[cuda]' in place of 'likely[cpu]'"
        )
    count = cuda_devices()
    if count <= device.index:
        raise DeviceError(
            f"device {device} was asked for, but the NVIDIA driver reports {count} of them"
        )
    _preload()


@cache  # once a process
def _preload() -> None:
    """Loads CUDA's libraries; those that are not found are reported on standard error."""
    # Only one at a time: of two redirections at once, one would remain in place.
    with _PRELOAD_LOCK, redirect_stdout(sys.stderr):
        runtime().preload_dlls()


def _check_interface(
    path: Path, what: str, specs: Sequence[TensorSpec], arguments: Sequence[Any]
) -> None:
    declared = {spec.name: (_ONNX_TYPES[spec.dtype], list(spec.shape)) for spec in specs}
    seen = {arg.name: (arg.type, list(arg.shape)) for arg in arguments}
    if declared != seen:
        raise BundleError(
            f"{path} has the {what}s {seen} where the manifest says {declared}", "graph"
        )


_ONNX_TYPES = {"uint8": "tensor(uint8)", "int64": "tensor(int64)", "float32": "tensor(float)"}


def agrees(got: Array, expected: Array) -> bool:
    """Whether a replayed output agrees with the recorded one.

    Integers must be equal; other numbers may differ by 1e-3 plus 1e-4 of their size.
    """
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    if np.issubdtype(got.dtype, np.integer):
        return bool(np.array_equal(got, expected))
    return bool(np.allclose(got, expected, rtol=1e-4, atol=1e-3))
