"""Faults of a card: what ONNX Runtime says of it is understood, and no CPU takes its place."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest

from likely import graphs
from likely.bundle import Bundle, Role
from likely.errors import DeviceError, DeviceLost, LikelyError, OutOfMemory
from likely.graphs import CPU, CUDA, Device, Session

if TYPE_CHECKING:
    from tests.conftest import Toy

X = {"x": np.zeros((2, 1, 3, 3), np.uint8)}


def said(library: str, number: int, words: str) -> str:
    """A failed call of a library as ONNX Runtime tells it (core/providers/cuda/cuda_call.cc)."""
    return (
        f"{library} failure {number}: {words} ; GPU=0 ; hostname=there ; "
        "file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_stream_handle.cc ; line=700 ; "
        "expr=cudaStreamSynchronize(static_cast<cudaStream_t>(GetHandle())); "
    )


def of_node(text: str) -> str:
    """The same where a node of the graph failed with it (core/framework/sequential_executor.cc)."""
    node = "Non-zero status code returned while running Conv node. Name:'/conv/Conv'"
    return f"[ONNXRuntimeError] : 1 : FAIL : {node} Status Message: {text}"


def of_arena(text: str) -> str:
    """What an allocation failed with (core/framework/bfc_arena.cc)."""
    where = "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360"
    return f"{where} void* onnxruntime::BFCArena::AllocateRawInternal(size_t) {text}"


# Numbers of cudaError_t and what cudaGetErrorString says of them.
LOST = {
    46: "CUDA-capable device(s) is/are busy or unavailable",
    100: "no CUDA-capable device is detected",
    214: "uncorrectable ECC error encountered",
    226: "Invalid access of peer GPU memory over nvlink or a hardware error",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    709: "context is destroyed",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    721: "tensor memory not completely freed",
    810: "MPS client terminated",
    911: "External device error",
    999: "unknown error",
}
NO_MEMORY = {
    "card": said("CUDA", 2, "out of memory"),
    "cuBLAS": said("CUBLAS", 3, "CUBLAS_STATUS_ALLOC_FAILED"),
    "cuDNN 8": said("CUDNN", 2, "CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": said("CUDNN", 4004, "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "allocation": of_arena("Failed to allocate memory for requested buffer of size 700"),
    "limit": of_arena("Available memory of 1048576 is smaller than requested bytes of 16777216"),
    "block": of_arena(
        "Failed to find a free memory block despite calling Extend. rounded_bytes=1024"
    ),
    "standard": "std::bad_alloc",
}
OTHER = {
    "argument": said("CUDA", 1, "invalid argument"),
    "resources": said("CUDA", 701, "too many resources requested for launch"),
    "longer number": said("CUDA", 7000, "unrecognized error code"),
    "cuDNN 8": said("CUDNN", 4, "CUDNN_STATUS_INTERNAL_ERROR"),
    "cuDNN 9": said("CUDNN", 5000, "CUDNN_STATUS_EXECUTION_FAILED"),
    "cuBLAS": said("CUBLAS", 13, "CUBLAS_STATUS_EXECUTION_FAILED"),
    "shape": "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: x for "
    "the following indices\n index: 2 Got: 700 Expected: 3",
}

Fail = Callable[[Exception], None]


class Failing:
    """A session of ONNX Runtime whose every run raises, bound to a card or not."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def run(self, *_: Any) -> NoReturn:
        raise self._error

    run_with_iobinding = run

    def io_binding(self) -> Any:
        def bind(*_: Any) -> None:
            """Takes what it is given."""

        return SimpleNamespace(bind_ortvalue_input=bind, bind_output=bind)


@pytest.fixture(params=["processor", "card", "copy to the card"])
def failing(
    request: pytest.FixtureRequest, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> tuple[Session, Fail]:
    """A session, and what makes its runtime fail: in a run, or before it."""
    bundle = Bundle.open(toy.path)
    session = Session(
        bundle.graph(Role.DENSITY), bundle.manifest.graphs[Role.DENSITY], Device("cpu")
    )

    def fail(error: Exception) -> None:
        def copied(*_: Any) -> None:
            if request.param == "copy to the card":
                raise error

        session._session = Failing(error)
        if request.param != "processor":
            session._device = Device("cuda")
            fake = SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_numpy=copied))
            monkeypatch.setattr(graphs, "_runtime", lambda: fake)

    return session, fail


def raised(session: Session, kind: type[Exception] = Exception) -> Exception:
    """What comes of a run that fails."""
    with pytest.raises(kind) as caught:
        session.run(X, ["log_px"])
    return caught.value


def wordings(text: str) -> list[Exception]:
    """That text as the runtime's own errors, and as the plain ones of a call that throws."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    return [runtime.Fail(of_node(text)), runtime.EPFail(text), RuntimeError(text)]


@pytest.mark.fault(30)
@pytest.mark.parametrize("number", LOST)
def test_a_card_that_is_lost_is_understood_as_such(
    failing: tuple[Session, Fail], number: int
) -> None:
    session, fail = failing
    for library in ("CUDA failure", "CUDA error"):
        text = said("CUDA", number, LOST[number]).replace("CUDA failure", library)
        for error in wordings(text):
            fail(error)
            lost = raised(session, DeviceLost)
            assert lost.__cause__ is error
            assert f"{library} {number}:" in str(lost)


@pytest.mark.fault(29)
@pytest.mark.parametrize("text", NO_MEMORY.values(), ids=NO_MEMORY)
def test_too_little_memory_is_no_lost_card(failing: tuple[Session, Fail], text: str) -> None:
    session, fail = failing
    for error in (*wordings(text), MemoryError()):
        fail(error)
        assert raised(session, OutOfMemory).__cause__ is error


@pytest.mark.fault(30)
@pytest.mark.parametrize("text", OTHER.values(), ids=OTHER)
def test_an_error_of_one_run_is_neither(failing: tuple[Session, Fail], text: str) -> None:
    session, fail = failing
    for error in wordings(text):
        fail(error)
        other = raised(session)
        assert not isinstance(other, LikelyError)
        assert str(other) == str(error)


@pytest.mark.fault(31)
@pytest.mark.parametrize("is_real", [False, True], ids=["faked", "real"])
def test_a_session_that_fell_back_to_the_cpu_is_refused(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, is_real: bool
) -> None:
    """The installed runtime itself, where it has CUDA and the libraries are absent."""
    import onnxruntime as ort

    bundle = Bundle.open(toy.path)
    path, spec = bundle.graph(Role.DENSITY), bundle.manifest.graphs[Role.DENSITY]
    asked: list[Any] = []
    if not is_real:
        opened = ort.InferenceSession

        def fallen(path: str, options: Any, providers: list[Any]) -> Any:
            asked.extend(providers)
            return opened(path, options, providers=[CPU])

        monkeypatch.setattr(ort, "InferenceSession", fallen)
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    elif CUDA not in ort.get_available_providers() or graphs.cuda_devices():
        pytest.skip("there is a card, or a runtime without CUDA")
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(graphs, "cuda_devices", lambda: 1)
    for device in (Device("cuda"), Device("auto")):
        with pytest.raises(DeviceError, match=f"the session runs on {CPU}"):
            Session(path, spec, device)
    assert is_real or [provider[0] for provider in asked[::2]] == [CUDA] * 2
