"""A toy bundle: real ONNX graphs that honour the contract, small enough to be checked by hand."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from runtime.bundle import (
    FIRST_PASS,
    FORMAT,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SECOND_PASS,
    Manifest,
    MatrixBases,
    PassSpec,
    PreprocessSpec,
    RouterSpec,
    StoredArray,
    TaskSpec,
    TensorSpec,
)
from runtime.checksums import file_specs
from runtime.manifest import json_from_manifest

SIZE, D, R = 8, 12, 2
CLASSES = {
    "cars": ("suv", "sedan"),
    "birds": ("wren", "owl", "tit"),
    "digits": ("0", "1"),
    "flowers": ("rose",),
}
T = len(CLASSES)
SUM_C = sum(map(len, CLASSES.values()))


def polar(stack):
    p, _, qh = np.linalg.svd(stack, full_matrices=False)
    return p @ qh


@dataclass(frozen=True)
class Toy:
    """The numbers of a toy model: a fixed embedding, then one linear layer and a vector parameter."""

    embed: np.ndarray  # [3*SIZE*SIZE, D]
    centres: np.ndarray  # [T, D]
    w0: np.ndarray  # [D, D]
    u_t: np.ndarray  # [T, R, D]
    s: np.ndarray  # [T, R]
    vh: np.ndarray  # [T, R, D]
    vectors: np.ndarray  # [T, D]
    heads: np.ndarray  # [D, sum C]

    @classmethod
    def random(cls) -> "Toy":
        rng = np.random.default_rng(7)
        bases = [[np.linalg.qr(rng.normal(size=(D, R)))[0].T for _ in range(T)] for _ in range(2)]
        parts = (
            rng.normal(size=(3 * SIZE * SIZE, D)) / 8,
            rng.normal(size=(T, D)) / 2,
            rng.normal(size=(D, D)) / 4,
            np.stack(bases[0]),
            rng.random((T, R)) + 0.5,
            np.stack(bases[1]),
            rng.normal(size=(T, D)) / 4,
            rng.normal(size=(D, SUM_C)),
        )
        return cls(*(part.astype(np.float32) for part in parts))

    def residuals(self, pixel_values):
        z = pixel_values.reshape(len(pixel_values), -1).astype(np.float64) @ self.embed
        return np.linalg.norm(z[:, None] - self.centres, axis=2)

    def logits(self, pixel_values, sets, weights=None):
        """Dense merge of each sample's set; TSV-M without `weights`, else the weighted sum."""
        rows = []
        for row, tasks in enumerate(sets):
            z = pixel_values[row].reshape(-1).astype(np.float64) @ self.embed
            kept = list(tasks)
            if weights is None:
                u = polar(np.concatenate(self.u_t[kept].astype(np.float64)).T)
                delta = (u * np.concatenate(self.s[kept])) @ polar(
                    np.concatenate(self.vh[kept].astype(np.float64))
                )
                vector = self.vectors[kept].mean(axis=0)
            else:
                w = weights[row][kept] / weights[row][kept].sum()
                delta = np.einsum("k,kro,kr,kri->oi", w, self.u_t[kept], self.s[kept], self.vh[kept])
                vector = np.einsum("k,kd->d", w, self.vectors[kept])
            rows.append(((self.w0 + delta) @ z + vector) @ self.heads)
        return np.stack(rows)

    def pixel_values(self, count, seed=0):
        rng = np.random.default_rng(seed)
        return rng.normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


class _GraphBuilder:
    """Just enough of ONNX to write the two graphs."""

    def __init__(self) -> None:
        self.nodes, self.initializers = [], []

    def constant(self, array):
        from onnx import numpy_helper

        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind, *inputs, out=None, **attributes):
        from onnx import helper

        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    def integers(self, *values):
        return self.constant(np.array(values, np.int64))

    def save(self, path, spec):
        import onnx
        from onnx import TensorProto, helper

        def info(tensor):
            return helper.make_tensor_value_info(
                tensor.name,
                getattr(TensorProto, {"float32": "FLOAT", "int64": "INT64", "uint8": "UINT8"}[tensor.dtype]),
                tensor.shape,
            )

        graph = helper.make_graph(
            self.nodes,
            path.stem,
            list(map(info, spec.inputs)),
            list(map(info, spec.outputs)),
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, path)


PIXEL_VALUES = TensorSpec("pixel_values", "float32", ("B", 3, SIZE, SIZE))
BYTES = TensorSpec("images", "uint8", ("B", SIZE, SIZE, 3))
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def normalised_here(b, images):
    """Graphs that take bytes make `pixel_values` of them; what they take."""
    if images == "uint8":
        shares = b.op("Div", b.op("Cast", "images", to=1), b.constant(np.float32(255)))
        centred = b.op("Sub", shares, b.constant(np.array(MEAN, np.float32)))
        scaled = b.op("Div", centred, b.constant(np.array(STD, np.float32)))
        b.op("Transpose", scaled, perm=[0, 3, 1, 2], out="pixel_values")
        return BYTES
    return PIXEL_VALUES


def write_first_pass(toy, path, *, with_unknown=False, images="float32"):
    """With `unknown` it also tells how far even the nearest task is."""
    b = _GraphBuilder()
    taken = normalised_here(b, images)
    z = b.op("MatMul", b.op("Flatten", "pixel_values"), b.constant(toy.embed))
    difference = b.op("Sub", b.op("Unsqueeze", z, b.integers(1)), b.constant(toy.centres))
    squares = b.op("ReduceSum", b.op("Mul", difference, difference), b.integers(2), keepdims=0)
    b.op("Sqrt", squares, out="residuals")
    outputs = [TensorSpec("residuals", "float32", ("B", T))]
    if with_unknown:
        b.op("ReduceMin", "residuals", b.integers(1), keepdims=0, out="unknown")
        outputs.append(TensorSpec("unknown", "float32", ("B",)))
    spec = PassSpec(path.name, (taken,), tuple(outputs))
    b.save(path, spec)
    return spec


def write_second_pass(toy, path, compose, images="float32"):
    b = _GraphBuilder()
    inputs = [
        normalised_here(b, images),
        TensorSpec("slots", "int64", ("S", "K")),
        TensorSpec("weights", "float32", ("S", "K")),
    ]
    z = b.op("MatMul", b.op("Flatten", "pixel_values"), b.constant(toy.embed))
    x = b.op("Unsqueeze", z, b.integers(1))  # [B, 1, D]

    def gather(bases):
        return b.op("Reshape", b.op("Gather", b.constant(bases), "slots", axis=0), b.integers(0, -1, D))

    h = b.op("MatMul", x, b.op("Transpose", gather(toy.vh), perm=[0, 2, 1]))  # [B, 1, K*R]
    if compose == "tsvm":
        inputs.append(TensorSpec("cores.w0", "float32", ("S", "KR", "KR")))
        h = b.op("MatMul", h, b.op("Transpose", "cores.w0", perm=[0, 2, 1]))
    else:
        scale = b.op(
            "Mul", b.op("Gather", b.constant(toy.s), "slots"), b.op("Unsqueeze", "weights", b.integers(2))
        )
        h = b.op("Mul", h, b.op("Reshape", scale, b.integers(0, 1, -1)))
    vector = b.op(
        "MatMul",
        b.op("Unsqueeze", "weights", b.integers(1)),
        b.op("Gather", b.constant(toy.vectors), "slots"),
    )
    y = b.op("Add", b.op("MatMul", x, b.constant(toy.w0.T)), b.op("MatMul", h, gather(toy.u_t)))
    feature = b.op("Squeeze", b.op("Add", y, vector), b.integers(1))
    b.op("MatMul", feature, b.constant(toy.heads), out="logits")
    spec = PassSpec(path.name, tuple(inputs), (TensorSpec("logits", "float32", ("B", SUM_C)),))
    b.save(path, spec)
    return spec


def write_bundle(toy, directory, compose="tsvm", images="float32", **router):
    data, stored = b"", []
    for array in (toy.u_t, toy.s, toy.vh):
        stored.append(StoredArray("weights.bin", len(data), "float32", array.shape))
        data += array.astype("<f4").tobytes()
    (directory / "weights.bin").write_bytes(data)
    passes = {
        FIRST_PASS: write_first_pass(
            toy, directory / "first_pass.onnx", with_unknown="unknown_threshold" in router, images=images
        ),
        SECOND_PASS: write_second_pass(toy, directory / "second_pass.onnx", compose, images),
    }
    tasks, start = [], 0
    for name, classes in CLASSES.items():
        tasks.append(TaskSpec(name, classes, start, start + len(classes)))
        start += len(classes)
    settings = {
        "mode": "topk", "threshold": 0.2, "temperature": 1.0, "max_tasks": 3, "head_choice": "max",
        "layers": [1], "site": "mlp", "token": "cls", "norm": "l2",
    }  # fmt: skip
    manifest = Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        producer="tests",
        model={"width": D},
        preprocess=PreprocessSpec((SIZE, SIZE), MEAN, STD, dtype=images),
        tasks=tuple(tasks),
        router=RouterSpec(**{**settings, **router}),
        compose=compose,
        passes=passes,
        matrices=(MatrixBases("w0", "cores.w0", (R,) * T, *stored),),
        files=file_specs(directory),
        provenance={},
    )
    (directory / MANIFEST_FILE).write_text(json_from_manifest(manifest), encoding="utf-8")


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy.random()


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory, toy) -> Callable[..., Path]:
    """`toy_bundle(compose, **router)`: the directory, made once per settings; do not change it."""
    pytest.importorskip("onnx")
    made: dict[str, Path] = {}

    def make(compose: str = "tsvm", **router: object) -> Path:
        key = json.dumps([compose, router])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundle")
            write_bundle(toy, made[key], compose, **router)
        return made[key]

    return make


@pytest.fixture
def own_bundle(tmp_path, toy_bundle) -> Path:
    """A toy bundle that the test may damage."""
    return Path(shutil.copytree(toy_bundle(), tmp_path / "bundle"))


@pytest.fixture
def edit_manifest(own_bundle) -> Callable[[Callable[[dict], None]], Path]:
    """`edit_manifest(change)`: apply `change` to the manifest's JSON; returns the bundle."""

    def edit(change: Callable[[dict], None]) -> Path:
        path = own_bundle / MANIFEST_FILE
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return own_bundle

    return edit


@pytest.fixture
def prediction_keys():
    """What a prediction holds as JSON."""
    route = {"gates", "residuals", "route_margin", "route_confidence", "unknown", "is_unknown"}
    return {"task", "label", "score", "alternatives"} | route
