"""Rules for the whole package: its imports and its signatures."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import pconv_jax

ROOT = pathlib.Path(pconv_jax.__file__).parent

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(ROOT.rglob("*.py"))
}


# Names that only one module may use.
OWNERS = {
    "orbax": "runs.checkpoint",
    "tensorflow_datasets": "data.tfds_source",
    "tensorboardX": "train.loggers",
    "pmap": "runs.parallel",
    "shard_map": "runs.parallel",
    "jax.distributed": "runs.parallel",
    "multihost_utils": "runs.parallel",
    "tensorflow": None,
    "torch": None,
}


def imports(tree):
    """Yield the dotted names of all imports anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import absolutely"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(tree):
    """Yield all dotted names, imported or used, and their parts."""
    used = (ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    for name in (*imports(tree), *used):
        parts = name.split(".")
        yield from parts
        yield from map(".".join, zip(parts, parts[1:]))


def functions(tree):
    """Yield public functions, and public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "modules, without",
    [
        ([], ["jax"]),
        (["metrics"], ["flax", "pconv_jax.weights"]),
        (["ops", "layers", "nnx", "unet", "vgg", "losses"], []),
        (["metrics.lpips", "metrics.inception"], []),
    ],
    ids=["package", "metrics", "core", "learned metrics"],
)
def test_importing_is_light_and_touches_no_device(modules, without):
    heavy = [
        "cv2",
        "grain",
        "orbax",
        "skimage",
        "tensorboardX",
        "tensorflow",
        "tensorflow_datasets",
        "torch",
        *without,
    ]
    result = run(f"""
import importlib, sys
import pconv_jax
for module in {modules}:
    importlib.import_module("pconv_jax." + module)
loaded = set({heavy}) & set(sys.modules)
assert not loaded, loaded
# JAX refuses this once devices are initialized.
import jax
jax.config.update("jax_num_cpu_devices", 3)
assert len(jax.devices("cpu")) == 3
""")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", OWNERS)
def test_only_one_module_uses(name):
    knowing = {module for module, tree in MODULES.items() if name in names(tree)}
    assert knowing <= {OWNERS[name]}


@pytest.mark.parametrize("module", MODULES)
def test_signatures(module):
    faults = []
    for function in functions(MODULES[module]):
        arguments = [*function.args.posonlyargs, *function.args.args]
        optional = arguments[len(arguments) - len(function.args.defaults) :]
        arguments = [a for a in arguments if a.arg not in ("self", "cls")]
        every = [*arguments, *function.args.kwonlyargs]
        types = {a.arg: a.annotation and ast.unparse(a.annotation) for a in every}
        # Options are keyword-only. Other optional arguments are arrays, the source of
        # arrays, or the only argument.
        for name in (a.arg for a in optional if len(arguments) > 1):
            if "Array" not in types[name] and name != "source":
                faults.append(f"{function.name}: {name} must be keyword-only")
        if "key" in types and every[0].arg != "key":
            faults.append(f"{function.name}: key must be first")
        if types.get("rng", "np.random.Generator") != "np.random.Generator":
            faults.append(f"{function.name}: rng must be NumPy's; JAX's is key")
        if None in types.values() or function.returns is None:
            faults.append(f"{function.name}: types are missing")
    assert not faults


@pytest.mark.parametrize("name", pconv_jax._MODULES)
def test_public_names_are_lazy_and_typed(name):
    value = getattr(pconv_jax, name)
    module = f"pconv_jax.{pconv_jax._MODULES[name]}"
    assert getattr(sys.modules[module], name) is value
    # Type checkers see the same name from the same module.
    assert f"{module}.{name}" in imports(MODULES["__init__"])


@pytest.mark.parametrize("name", pconv_jax._SUBMODULES)
def test_modules_are_attributes(name, monkeypatch):
    monkeypatch.delattr(pconv_jax, name, raising=False)
    assert getattr(pconv_jax, name) is importlib.import_module(f"pconv_jax.{name}")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.delattr(pconv_jax, "evaluate_run", raising=False)
    monkeypatch.delitem(sys.modules, "pconv_jax.evaluate.runner", raising=False)
    monkeypatch.setitem(sys.modules, "ml_collections", None)
    for module in [n for n in sys.modules if n.startswith("pconv_jax.runs")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"evaluate_run needs ml_collections: pip install 'pconv-jax\[train\]'",
    ):
        _ = pconv_jax.evaluate_run


def test_a_star_import_brings_only_names_of_the_base_installation():
    code = """
import sys
for name in ("grain", "ml_collections", "skimage", "jinja2", "tensorboardX"):
    sys.modules[name] = None
from flax import nnx
from pconv_jax import *
nnx.Rngs(0), PartialConv, Inpainter
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_namespace():
    assert {*pconv_jax.__all__, *pconv_jax._MODULES} <= set(dir(pconv_jax))
    typed = {n for n in imports(MODULES["__init__"]) if n.startswith("pconv_jax.")}
    assert len(typed) == len(pconv_jax._MODULES) + 1
    assert "pconv_jax.nnx" in typed
    public = {n.partition(".")[0] for n in MODULES if not n.startswith("_")}
    assert set(pconv_jax._SUBMODULES) == public - {"cli"}
    with pytest.raises(AttributeError, match="no attribute 'PartialConv3'"):
        _ = pconv_jax.PartialConv3
