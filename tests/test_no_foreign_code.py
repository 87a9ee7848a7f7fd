"""Nothing that is read may run as code: no pickle, no eval, no code from a hub."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedp2eft

FILES = sorted(Path(fedp2eft.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
           "runpy", "code", "ctypes"}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "torch.jit.load",
    "torch.package.PackageImporter", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "os.system", "os.popen", "shutil.unpack_archive",
}  # fmt: skip
METHODS = {"extractall", "extract"}  # of an archive, whose names may lead anywhere
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}  # must be the word False


def faults(source: str) -> list[str]:
    """What a source file does that could run foreign code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}" in CALLS
            ]
        found += [name for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.rpartition(".")[2] in METHODS and "." in name:
                found.append(name)
            if name in CALLS or name in ("np.load", "numpy.load"):
                found.append(name)
            for keyword in node.keywords:
                value = keyword.value
                false = isinstance(value, ast.Constant) and value.value is False
                if keyword.arg in KEYWORDS and not false:
                    found.append(f"{name}({keyword.arg}=…)")
                true = isinstance(value, ast.Constant) and value.value is True
                if keyword.arg == "weights_only" and not true:
                    found.append(f"{name}(weights_only=…)")
        if isinstance(node, ast.Constant) and node.value in KEYWORDS:
            found.append(f"the word {node.value!r}")  # an option of a mapping
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_source_file(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "torch.load(p)", "from torch import load",
     "np.load(p)", "yaml.load(p)", "eval('1')", "f(trust_remote_code=True)",
     "f(trust_remote_code=x)", "f(**{'trust_remote_code': True})", "run(c, shell=True)",
     "g(p, weights_only=False)", "g(p, allow_pickle=flag)", "tar.extractall(p)"],
)  # fmt: skip
def test_the_scan_sees(source: str) -> None:
    assert faults(source)


def test_the_scan_lets_pass() -> None:
    fine = "model.eval()\nre.compile('a')\nf(trust_remote_code=False)\nyaml.safe_load(t)"
    assert faults(fine) == []


def test_flower_reads_arrays_without_pickle() -> None:
    """The bytes of an `Array` are NumPy's file format; Flower must not allow objects in it."""
    import io

    import numpy as np
    from flwr.app import Array

    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    trap = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=stream.getvalue())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        trap.numpy()
    for stype in ("pickle", "torch.Tensor", ""):
        with pytest.raises(TypeError):
            Array(dtype="float32", shape=(1,), stype=stype, data=b"").numpy()
