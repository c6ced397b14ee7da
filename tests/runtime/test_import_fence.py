"""The runtime runs where torch, onnx and the builder are absent, and starts light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import runtime

ROOT = Path(runtime.__file__).parent
BUILDERS = (
    "torch",
    "torchvision",
    "open_clip",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "mass_export",
    "safetensors",
    "click",
)
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({BUILDERS!r})); "


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=ROOT.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_these():
    assert runtime.__all__ == [
        "BackendError", "BundleError", "Classifier", "ForwardResult", "InputError", "MassRuntimeError",
        "Prediction", "__version__",
    ]  # fmt: skip
    assert all(hasattr(runtime, name) for name in runtime.__all__)
    assert isinstance(runtime.__version__, str)


def test_importing_loads_neither_the_backend_nor_pillow_nor_any_builder():
    heavy = [*BUILDERS, "onnxruntime", "PIL"]
    loaded = run(f"import sys, runtime; print([m for m in {heavy!r} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_classifying_needs_no_builder(toy_bundle, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    code = BLOCK + "from runtime.__main__ import main; sys.exit(main(sys.argv[1:]))"
    (found,) = json.loads(run(code, toy_bundle(), tmp_path / "a.png", "--json", "--provider", "cpu"))
    with runtime.Classifier(toy_bundle(), "cpu") as classifier:
        assert found["label"] == classifier.predict([pixels])[0].label


def test_modules_import_only_the_standard_library_and_the_few_packages_allowed():
    allowed = set(sys.stdlib_module_names) | {"numpy", "runtime"}
    extra = {"preprocess.py": {"PIL"}, "onnx_session.py": {"onnxruntime"}, "cuda_device.py": {"cuda"}}
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            packages = {str(name).partition(".")[0] for name in names}
            assert packages <= allowed | extra.get(path.name, set()), path.name
