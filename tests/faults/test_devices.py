"""Faults of a card: what ONNX Runtime says of it is understood, and no CPU takes its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest
from click.testing import CliRunner

from likely import graphs
from likely.batching.traffic import Traffic
from likely.bundle import Bundle, Role
from likely.errors import BundleError, DeviceError, DeviceLost, LikelyError, OutOfMemory
from likely.graphs import CPU, CUDA, Device, Session
from likely.settings import load
from likely.versions.loading import Loader

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


def thrown(text: str) -> str:
    """The same as an exception: behind the place that it came through."""
    return (
        "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 "
        "std::conditional_t<THRW, void, common::Status> onnxruntime::CudaCall(ERRTYPE, "
        "const char*, const char*, SUCCTYPE, const char*, const char*, int) "
        "[with ERRTYPE = cudaError; bool THRW = true; "
        f"SUCCTYPE = cudaError; std::conditional_t<THRW, void, common::Status> = void] {text}"
    )


def launched(name: str, words: str) -> str:
    """A failed launch of a kernel (core/providers/cuda/cuda_kernel.h)."""
    return f"CUDA error cudaError{name}:{words}"


def of_node(text: str) -> str:
    """The same where a node of the graph failed with it (core/framework/sequential_executor.cc)."""
    node = "Non-zero status code returned while running Conv node. Name:'/conv/Conv'"
    return f"[ONNXRuntimeError] : 1 : FAIL : {node} Status Message: {text}"


def of_arena(text: str) -> str:
    """What an allocation failed with (core/framework/bfc_arena.cc)."""
    where = "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360"
    return f"{where} void* onnxruntime::BFCArena::AllocateRawInternal(size_t) {text}"


# Numbers and names of cudaError_t, and what cudaGetErrorString says of them.
LOST = {
    46: ("DevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"),
    100: ("NoDevice", "no CUDA-capable device is detected"),
    214: ("ECCUncorrectable", "uncorrectable ECC error encountered"),
    226: ("Contained", "Invalid access of peer GPU memory over nvlink or a hardware error"),
    700: ("IllegalAddress", "an illegal memory access was encountered"),
    702: ("LaunchTimeout", "the launch timed out and was terminated"),
    709: ("ContextIsDestroyed", "context is destroyed"),
    710: ("Assert", "device-side assert triggered"),
    714: ("HardwareStackError", "hardware stack error"),
    715: ("IllegalInstruction", "an illegal instruction was encountered"),
    716: ("MisalignedAddress", "misaligned address"),
    717: ("InvalidAddressSpace", "operation not supported on global/shared address space"),
    718: ("InvalidPc", "invalid program counter"),
    719: ("LaunchFailure", "unspecified launch failure"),
    721: ("TensorMemoryLeak", "tensor memory not completely freed"),
    810: ("MpsClientTerminated", "MPS client terminated"),
    911: ("ExternalDevice", "External device error"),
    999: ("Unknown", "unknown error"),
}
NO_MEMORY = {
    "card": said("CUDA", 2, "out of memory"),
    "cuBLAS": said("CUBLAS", 3, "CUBLAS_STATUS_ALLOC_FAILED"),
    "cuBLAS 13": said("CUBLAS", 3, "the resource allocation failed"),
    "cuDNN 8": said("CUDNN", 2, "CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": said("CUDNN", 4004, "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "allocation": of_arena("Failed to allocate memory for requested buffer of size 700"),
    "limit": of_arena("Available memory of 1048576 is smaller than requested bytes of 16777216"),
    "block": of_arena(
        "Failed to find a free memory block despite calling Extend. rounded_bytes=1024"
    ),
    "launch": launched("MemoryAllocation", "out of memory"),
    "standard": "std::bad_alloc",
}
OTHER = {
    "argument": said("CUDA", 1, "invalid argument"),
    "resources": said("CUDA", 701, "too many resources requested for launch"),
    "longer number": said("CUDA", 7000, "unrecognized error code"),
    "launch": launched("LaunchOutOfResources", "too many resources requested for launch"),
    "cuDNN 8": said("CUDNN", 4, "CUDNN_STATUS_INTERNAL_ERROR"),
    "cuDNN 9": said("CUDNN", 5000, "CUDNN_STATUS_EXECUTION_FAILED"),
    "cuBLAS": said("CUBLAS", 13, "CUBLAS_STATUS_EXECUTION_FAILED"),
    "shape": "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: x for "
    "the following indices\n index: 2 Got: 700 Expected: 3",
}

Fail = Callable[[Exception], None]
Unopened = Callable[[str, Exception], Exception]


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
            monkeypatch.setattr(graphs, "runtime", lambda: fake)

    return session, fail


def raised(session: Session, kind: type[Exception] = Exception) -> Exception:
    """What comes of a run that fails."""
    with pytest.raises(kind) as caught:
        session.run(X, ["log_px"])
    return caught.value


def wordings(text: str) -> list[Exception]:
    """That text as the runtime's own errors, and as the plain ones of a call that throws."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    return [
        runtime.Fail(of_node(text)),
        runtime.EPFail(text),
        RuntimeError(text),
        RuntimeError(thrown(text)),
    ]


@pytest.mark.fault(30)
@pytest.mark.parametrize("number", LOST)
def test_a_card_that_is_lost_is_understood_as_such(
    failing: tuple[Session, Fail], number: int
) -> None:
    session, fail = failing
    name, words = LOST[number]
    for text in (said("CUDA", number, words), launched(name, words)):
        for error in wordings(text):
            fail(error)
            lost = raised(session, DeviceLost)
            assert lost.__cause__ is error
            assert str(lost) == f"the card is lost: {text.partition(' ; ')[0]}"


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

        def fallen(path: str, options: Any, providers: list[Any], **_: Any) -> Any:
            asked.extend(providers)
            return opened(path, options, providers=[CPU])

        monkeypatch.setattr(ort, "InferenceSession", fallen)
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    elif CUDA not in ort.get_available_providers() or graphs.cuda_devices():
        pytest.skip("there is a card, or a runtime without CUDA")
    monkeypatch.setattr(graphs, "_preload", lambda: None)
    monkeypatch.setattr(graphs, "cuda_devices", lambda: 1)
    for device in (Device("cuda"), Device("auto")):
        with pytest.raises(DeviceError, match=f"the session runs on {CPU}"):
            Session(path, spec, device)
    assert is_real or [provider[0] for provider in asked[::2]] == [CUDA] * 2


NO_CUDNN = (
    "cuDNN is unavailable or disabled for CUDA Execution Provider: dlopen failed for libcudnn.so: "
    "libcudnn.so: cannot open shared object file: No such file or directory"
)
UNUSABLE = {
    "old driver": said("CUDA", 35, "CUDA driver version is insufficient for CUDA runtime version"),
    "busy": said("CUDA", 46, LOST[46][1]),
    "gone": said("CUDA", 100, LOST[100][1]),
    "old card": said("CUDA", 209, "no kernel image is available for execution on the device"),
    "cuBLAS": said("CUBLAS", 1, "CUBLAS_STATUS_NOT_INITIALIZED"),
}


@pytest.fixture
def unopened(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Unopened:
    """What comes of a graph that the runtime does not open on a device, as it says by an error."""
    import onnxruntime as ort

    def find(device: str, error: Exception) -> Exception:
        def fail(*_: Any, enable_fallback: int = 1, **__: Any) -> NoReturn:
            assert not enable_fallback
            raise error

        monkeypatch.setattr(ort, "InferenceSession", fail)
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(graphs, "_preload", lambda: None)
        monkeypatch.setattr(graphs, "cuda_devices", lambda: 1)
        loader = Loader(load({"device": device}), Traffic(), lambda *_: None)
        with pytest.raises(LikelyError) as caught:
            loader.load(Bundle.open(toy.path))
        assert caught.value.__cause__ is error
        return caught.value

    return find


@pytest.mark.fault(29)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("text", NO_MEMORY.values(), ids=NO_MEMORY)
def test_no_memory_to_open_a_graph_is_no_fault_of_it(
    unopened: Unopened, device: str, text: str
) -> None:
    for error in (*wordings(text), MemoryError()):
        assert isinstance(unopened(device, error), OutOfMemory)


@pytest.mark.fault(30)
@pytest.mark.parametrize("number", sorted(LOST.keys() - {46, 100}))
def test_a_card_lost_before_a_graph_opens_is_understood_as_such(
    unopened: Unopened, number: int
) -> None:
    for error in wordings(said("CUDA", number, LOST[number][1])):
        assert isinstance(unopened("cuda", error), DeviceLost)


@pytest.mark.fault(31)
@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
def test_a_card_that_cannot_be_used_is_told_with_its_cause(unopened: Unopened, text: str) -> None:
    for error in wordings(text):
        refused = unopened("cuda", error)
        assert isinstance(refused, DeviceError)
        assert str(refused).endswith(f"cannot be used: {text.partition(' ; ')[0]}")
        assert "not found" not in str(refused)


@pytest.mark.fault(31)
def test_libraries_that_are_absent_are_told_as_such(unopened: Unopened) -> None:
    absent = "CUDA_PATH is set but CUDA wasnt able to be loaded. Please install the correct version"
    for text in (absent, NO_CUDNN):
        refused = unopened("cuda", RuntimeError(text))
        assert isinstance(refused, DeviceError)
        assert "not found" in str(refused) and "likely[cuda]" in str(refused)


@pytest.mark.fault(31)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_graph_that_is_none_is_told_as_such(unopened: Unopened, device: str) -> None:
    refused = unopened(
        device, RuntimeError("Load model from a.onnx failed:Protobuf parsing failed")
    )
    assert isinstance(refused, BundleError) and refused.reason == "graph"


@pytest.mark.fault(31)
@pytest.mark.parametrize("text", [NO_CUDNN, UNUSABLE["old card"], OTHER["cuDNN 9"]])
@pytest.mark.parametrize("is_doctor", [False, True], ids=["server", "doctor"])
def test_a_card_that_fails_in_the_golden_replay_is_no_fault_of_the_bundle(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, text: str, is_doctor: bool
) -> None:
    from likely.cli import main

    opened = graphs._open
    cause = text.partition(" ; ")[0]
    for error in wordings(text):

        def failing(*asked: Any, error: Exception = error) -> Any:
            session = opened(*asked)
            return SimpleNamespace(
                get_providers=session.get_providers,
                get_inputs=session.get_inputs,
                get_outputs=session.get_outputs,
                run=Failing(error).run,
            )

        monkeypatch.setattr(graphs, "_open", failing)
        if is_doctor:
            ran = CliRunner().invoke(main, ["doctor", "--json", "--bundle", str(toy.path)])
            assert ran.exit_code == 1
            last = json.loads(ran.stdout.splitlines()[-1])
            assert last["state"] == "broken" and cause in last["found"]
            assert "cannot be loaded" not in last["found"]
            continue
        loader = Loader(load({"device": "cpu"}), Traffic(), lambda *_: None)
        with pytest.raises(DeviceError) as caught:
            loader.load(Bundle.open(toy.path))
        assert str(caught.value).endswith(f": {cause}")


@pytest.mark.fault(31)
def test_what_the_runtime_prints_of_libraries_spoils_no_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime as ort

    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcublas.so.13"))
    preload = graphs._preload.__wrapped__
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            pool.submit(preload)
    out = sys.stdout
    print("an answer")
    assert sys.stdout is out
    printed = capsys.readouterr()
    assert printed.out == "an answer\n"
    assert printed.err.count("Failed to load") == 50
