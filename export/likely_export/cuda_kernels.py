"""The operators that ONNX Runtime's CUDA provider supports at opset 20.

Read from docs/OperatorKernels.md of microsoft/onnxruntime at commit
001d12d2623fd411ce0f83d05abb5e82304a3389, the newest version at hand (the runtime
installed here is 1.31.1): domain ai.onnx, CUDAExecutionProvider.

A kernel that the document lists as `18+` supports version 18 of the operator only,
not a later one. A range such as `[13, 20]` supports every version in it. So Pad
(version 19 at opset 20), ConstantOfShape, ReduceMax and ReduceMin (20) and Equal (19)
are listed, but without a kernel that a graph of opset 20 can use.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOATS = frozenset({"float", "float16", "double"})
WIDE = FLOATS | {"int32", "int64", "uint32", "uint64"}
SIGNED = FLOATS | {"int8", "int16", "int32", "int64"}
WHOLE = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
NUMBERS = FLOATS | WHOLE
ALL = NUMBERS | {"bool"}
BOOL = frozenset({"bool"})


@dataclass(frozen=True)
class Kernel:
    """One line of the document.

    Attributes:
        first: first version of the operator that the kernel supports.
        last: last version that it supports.
        types: element types of the operator's data, as ONNX names them.
    """

    first: int
    last: int
    types: frozenset[str]


def _exactly(version: int, types: frozenset[str]) -> Kernel:
    return Kernel(version, version, types)


KERNELS = {
    "Abs": _exactly(13, NUMBERS),
    "Add": _exactly(14, NUMBERS),
    "And": _exactly(7, BOOL),
    "ArgMax": _exactly(13, FLOATS),
    "ArgMin": _exactly(13, FLOATS),
    "Cast": Kernel(19, 20, ALL),
    "Ceil": _exactly(13, FLOATS),
    "Clip": _exactly(13, FLOATS | {"int8", "int64", "uint8", "uint64"}),
    "Concat": _exactly(13, ALL),
    "ConstantOfShape": _exactly(9, frozenset({"int64"})),
    "Conv": Kernel(11, 21, FLOATS),
    "ConvTranspose": _exactly(11, FLOATS),
    "Cos": _exactly(7, FLOATS),
    "CumSum": _exactly(14, WIDE),
    "DepthToSpace": _exactly(13, FLOATS),
    "Div": _exactly(14, NUMBERS),
    "Einsum": _exactly(12, FLOATS),
    "Elu": _exactly(6, FLOATS),
    "Equal": _exactly(13, WIDE | BOOL),
    "Erf": _exactly(13, FLOATS),
    "Exp": _exactly(13, FLOATS),
    "Expand": _exactly(13, ALL),
    "Flatten": _exactly(13, ALL),
    "Floor": _exactly(13, FLOATS),
    "Gather": _exactly(13, ALL),
    "GatherElements": _exactly(13, ALL),
    "GatherND": _exactly(13, FLOATS | {"bool", "int64"}),
    "Gelu": _exactly(20, FLOATS),
    "Gemm": _exactly(13, FLOATS),
    "Greater": _exactly(13, WIDE),
    "GreaterOrEqual": _exactly(16, WIDE),
    "Identity": _exactly(19, ALL),
    "IsInf": _exactly(20, FLOATS),
    "IsNaN": _exactly(20, FLOATS),
    "LayerNormalization": _exactly(17, FLOATS),
    "LeakyRelu": _exactly(16, FLOATS),
    "Less": _exactly(13, WIDE),
    "LessOrEqual": _exactly(16, WIDE),
    "Log": _exactly(13, FLOATS),
    "LogSoftmax": _exactly(13, FLOATS),
    "MatMul": _exactly(13, FLOATS),
    "Max": _exactly(13, WIDE),
    "MaxPool": _exactly(12, FLOATS | {"int8", "uint8"}),
    "Min": _exactly(13, WIDE),
    "Mod": _exactly(13, WIDE),
    "Mul": _exactly(14, NUMBERS),
    "Neg": _exactly(13, SIGNED),
    "Not": _exactly(1, BOOL),
    "OneHot": _exactly(11, frozenset({"int32", "int64"})),
    "Or": _exactly(7, BOOL),
    "Pad": _exactly(18, FLOATS | BOOL),
    "Pow": _exactly(15, FLOATS | {"int32", "int64"}),
    "Range": _exactly(11, FLOATS - {"float16"} | {"int16", "int32", "int64"}),
    "Reciprocal": _exactly(13, FLOATS),
    "ReduceLogSumExp": _exactly(18, FLOATS),
    "ReduceMax": _exactly(18, FLOATS | {"int32", "int64"}),
    "ReduceMean": _exactly(18, FLOATS | {"int32"}),
    "ReduceMin": _exactly(18, FLOATS | {"int8", "int32", "int64", "uint8"}),
    "ReduceProd": _exactly(18, FLOATS | {"int32"}),
    "ReduceSum": _exactly(13, FLOATS | {"int32", "int64"}),
    "ReduceSumSquare": _exactly(18, FLOATS),
    "Relu": _exactly(14, FLOATS),
    "Reshape": Kernel(19, 20, ALL),
    "Resize": _exactly(19, FLOATS | {"int32", "uint8"}),
    "Round": _exactly(11, FLOATS),
    "Scan": _exactly(19, ALL),
    "ScatterElements": _exactly(18, ALL),
    "ScatterND": _exactly(18, ALL),
    "Shape": Kernel(19, 20, ALL),
    "Sigmoid": _exactly(13, FLOATS),
    "Sign": _exactly(13, NUMBERS),
    "Sin": _exactly(7, FLOATS),
    "Size": _exactly(13, ALL),
    "Slice": _exactly(13, ALL),
    "Softmax": _exactly(13, FLOATS),
    "Softplus": _exactly(1, FLOATS),
    "Softsign": _exactly(1, FLOATS),
    "Split": _exactly(18, ALL),
    "Sqrt": _exactly(13, FLOATS),
    "Squeeze": Kernel(13, 20, ALL),
    "Sub": _exactly(14, NUMBERS),
    "Sum": _exactly(13, FLOATS),
    "Tanh": _exactly(13, FLOATS),
    "Tile": _exactly(13, FLOATS | {"int32", "int64"}),
    "TopK": _exactly(11, FLOATS | {"int32", "int64"}),
    "Transpose": Kernel(13, 20, ALL),
    "Trilu": _exactly(14, ALL),
    "Unsqueeze": Kernel(13, 20, ALL),
    "Where": _exactly(16, FLOATS | {"int32", "int64", "uint8"}),
    "Xor": _exactly(7, BOOL),
}
