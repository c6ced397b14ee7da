"""ONNX file -> TensorRT network definition, strongly typed, and what is in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from runtime.bundle import PassSpec
from runtime.engine_settings import TensorRt
from runtime.errors import EngineError
from runtime.tensorrt_log import first_few


def parse_network(onnx_file: Path, builder: Any, tensorrt: TensorRt, log: Any) -> tuple[Any, Any]:
    """Parse a graph into a strongly typed network; returns it with its parser, which must outlive it.

    Raises:
        EngineError: naming every node that the parser refuses.
    """
    trt = tensorrt.module
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # later versions know no other
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_file)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        faults = [f"{e.node_operator()} node {e.node_name()!r}: {e.desc()}" for e in errors]
        raise EngineError(f"{onnx_file}: {tensorrt.flavour} cannot read the graph: {first_few(faults)}")
    return network, parser


def check_network(network: Any, spec: PassSpec, onnx_file: Path) -> None:
    """Compare names, types and shapes of the network's inputs and outputs with the manifest's.

    Raises:
        EngineError: listing each difference.
    """
    faults = []
    for kind, wanted, get, count in (
        ("input", spec.inputs, network.get_input, network.num_inputs),
        ("output", spec.outputs, network.get_output, network.num_outputs),
    ):
        parsed = {tensor.name: tensor for tensor in map(get, range(count))}
        expected = {tensor.name: tensor for tensor in wanted}
        faults += [f"{kind} {name} is only in one of them" for name in sorted(set(parsed) ^ set(expected))]
        for name in sorted(set(parsed) & set(expected)):
            ours = (expected[name].dtype, [d if isinstance(d, int) else -1 for d in expected[name].shape])
            theirs = (dtype_name(parsed[name].dtype), list(parsed[name].shape))
            if ours != theirs:
                faults.append(f"{kind} {name} is {theirs}, the manifest says {ours}")
    if faults:
        raise EngineError(
            f"{onnx_file}: the parsed network differs from the manifest: {first_few(faults, limit=8)}."
        )


def dtype_name(dtype: Any) -> str:
    """TensorRT's type by numpy's name: FLOAT -> float32."""
    names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
    name: str = dtype.name
    return names.get(name, name.lower())


def layer_precisions(network: Any) -> dict[str, dict[str, int]]:
    """How many layers of each type give each floating-point type, from the network itself.

    Returns:
        layer type -> dtype -> count, such as `{"MATRIX_MULTIPLY": {"float16": 40, "float32": 2}}`.
    """
    found: dict[str, Counter[str]] = {}
    for layer in map(network.get_layer, range(network.num_layers)):
        for output in map(layer.get_output, range(layer.num_outputs)):
            found.setdefault(layer.type.name, Counter())[dtype_name(output.dtype)] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(found.items())}
