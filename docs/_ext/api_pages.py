"""Writes the API reference: a page in ``docs/api/`` for each module of public names.

So a name that is added to the package gets its entry by itself.
"""

import dataclasses
import importlib
import inspect
import pathlib
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import stringify_signature

import pconv_jax
from pconv_jax import layers, unet

DOCS = pathlib.Path(__file__).parents[1]

# Public modules whose names are not attributes of the package, and what each follows.
_OTHER_MODULES = {
    "nnx": "layers",
    "data.tfds_source": "data.sources",
    "metrics": "data.tfds_source",
    "metrics.lpips": "metrics",
    "metrics.inception": "metrics.lpips",
    "weights.lpips": "weights.vgg",
    "weights.inception": "weights.lpips",
    "weights.formats.arrays": "weights.inception",
    "inpaint.detail": "inpaint.inpainter",
    "inpaint.shift_map": "inpaint.detail",
    "inpaint.hole": "inpaint.shift_map",
    "runs.config": "inpaint.hole",
    "runs.settings": "runs.config",
    "runs.opening": "runs.settings",
    "evaluate.methods": "evaluate.eval_set",
    "train.hooks": "train.loop",
}

# Fields of Flax's modules. Docstrings list them; those with defaults are members too.
_FIELDS = {
    field.name
    for module in (layers.PartialConv, layers.PartialConvTranspose, unet.PConvUNet)
    for field in dataclasses.fields(module)
    if field.name != "name"
}


def _write_pages(app: Sphinx) -> None:
    names: dict[str, list[str]] = {}
    for name, module in pconv_jax._MODULES.items():
        names.setdefault(module, []).append(name)
    order = list(names)
    for module, before in _OTHER_MODULES.items():
        order.insert(order.index(before) + 1, module)
    folder = DOCS / "api"
    folder.mkdir(exist_ok=True)
    index = [
        "# API reference",
        "",
        "Every name in these tables is an attribute of the package, such as",
        "`pconv_jax.PartialConv`. Each links to its entry on the page of its module,",
        "with arguments, shapes and errors. The names of a module without a table are",
        "attributes of the module.",
        "",
    ]
    pages = [module.lstrip("_").replace(".", "_") for module in order]
    for module, page in zip(order, pages):
        _write(folder / f"{page}.md", _module_page(module))
        index += [f"## [{_title(module)}]({page}.md)", "", _summary(module), ""]
        if module in names:
            index += ["| Name | |", "|---|---|"]
            index += [
                f"| {{py:obj}}`{name} <pconv_jax.{module}.{name}>` "
                f"| {_summary(module, name)} |"
                for name in names[module]
            ]
            index += [""]
    entries = [f"{_title(m).strip('`')} <{page}>" for m, page in zip(order, pages)]
    entries = [entry.removeprefix("pconv_jax.") for entry in entries]
    index += ["```{toctree}", ":hidden:", "", *entries, "```", ""]
    _write(folder / "index.md", "\n".join(index))


def _title(module: str) -> str:
    return "Errors" if module == "_errors" else f"`pconv_jax.{module}`"


def _module_page(module: str) -> str:
    directive = f".. automodule:: pconv_jax.{module}"
    if module == "metrics":  # It only imports its names.
        directive += "\n   :imported-members:"
    return f"# {_title(module)}\n\n```{{eval-rst}}\n{directive}\n```\n"


def _summary(module: str, name: str | None = None) -> str:
    """Take the first sentence of a docstring."""
    thing = importlib.import_module(f"pconv_jax.{module}")
    constants = ModuleAnalyzer.for_module(thing.__name__).find_attr_docs()
    if ("", name) in constants:
        text = "\n".join(constants["", name])
    else:
        text = inspect.getdoc(getattr(thing, name) if name else thing) or ""
    first = text.partition("\n\n")[0]
    return " ".join(first.split()).replace("``", "`").replace("|", "\\|")


def _write(path: pathlib.Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:  # Else Sphinx reads it again.
        path.write_text(text)


def _find_object(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.reference | None:
    """Resolve what docstrings call `ops.partial_conv` or `TrainState.average`."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removeprefix("pconv_jax.")
    domain = env.domains.python_domain
    # Fields that a class's docstring lists have no entry of their own.
    for wanted in (target, target.rpartition(".")[0]):
        matches = [x for x in domain.objects if wanted and x.endswith(f".{wanted}")]
        if matches:
            break
    if len(matches) != 1:
        return None
    docname = node.get("refdoc", "")
    return domain.resolve_xref(
        env, docname, app.builder, "obj", matches[0], node, contnode
    )


def _skip_member(
    app: Sphinx, kind: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """Leave out what says nothing: the generated members of tuples and modules."""
    generated = (inspect.getdoc(obj) or "").startswith("Alias for field number")
    return True if generated or (kind == "class" and name in _FIELDS) else None


def _shorten_signature(
    app: Sphinx,
    kind: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """Leave out the fields that Flax adds to every module, and addresses."""
    if signature is None:
        return None
    if kind == "class" and signature == "(*args, **kwargs)":  # Its metaclass's.
        signature = _init_signature(obj)
    signature = re.sub(r"(, )?parent=.*\)$", ")", signature)
    signature = re.sub(
        r"<(?:function|class) '?([\w.]+?)(?:\.<locals>.*?)?'?(?: at \w+)?>",
        r"\1",
        signature,
    )
    return signature.replace("mappingproxy({})", "{}"), returns


def _init_signature(cls: Any) -> str:
    """Format the arguments of a class's own constructor; none for a protocol."""
    if getattr(cls, "_is_protocol", False):
        return ""
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    return stringify_signature(inspect.Signature(parameters), show_annotation=False)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", _write_pages)
    app.connect("missing-reference", _find_object)
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("autodoc-process-signature", _shorten_signature)
    return {"parallel_read_safe": True}
