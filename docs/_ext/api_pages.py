"""Writes the API reference: a page in ``docs/api/`` for each module of public names.

So a name that is added to the package gets its entry by itself.
"""

import importlib
import inspect
import pathlib
import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import pconv_jax

DOCS = pathlib.Path(__file__).parents[1]

# Public modules whose names are not attributes of the package.
_OTHER_MODULES = (
    "data.tfds_source",
    "inpaint.detail",
    "metrics",
    "nnx",
    "metrics.lpips",
    "metrics.inception",
)


def _write_pages(app: Sphinx) -> None:
    names: dict[str, list[str]] = {}
    for name, module in pconv_jax._MODULES.items():
        names.setdefault(module, []).append(name)
    names |= {module: [] for module in _OTHER_MODULES}
    folder = DOCS / "api"
    folder.mkdir(exist_ok=True)
    index = [
        "# API reference",
        "",
        "Every name in these tables is an attribute of the package, such as",
        "`pconv_jax.PartialConv`. Each links to its entry on the page of its module,",
        "with arguments, shapes and errors.",
        "",
    ]
    for module, members in names.items():
        page = module.lstrip("_").replace(".", "_")
        _write(folder / f"{page}.md", _module_page(module))
        index += [f"## [`pconv_jax.{module}`]({page}.md)", "", _summary(module), ""]
        if members:
            index += ["| Name | |", "|---|---|"]
            index += [
                f"| {{py:obj}}`{name} <pconv_jax.{module}.{name}>` "
                f"| {_summary(module, name)} |"
                for name in members
            ]
            index += [""]
    pages = [f"{module.lstrip('_').replace('.', '_')}" for module in names]
    index += ["```{toctree}", ":hidden:", "", *pages, "```", ""]
    _write(folder / "index.md", "\n".join(index))


def _module_page(module: str) -> str:
    return "\n".join(
        [
            "# Errors" if module == "_errors" else f"# `pconv_jax.{module}`",
            "",
            "```{eval-rst}",
            f".. automodule:: pconv_jax.{module}",
            "```",
            "",
        ]
    )


def _summary(module: str, name: str | None = None) -> str:
    """Take the first sentence of a docstring; constants have none of their own."""
    thing = importlib.import_module(f"pconv_jax.{module}")
    if name:
        thing = getattr(thing, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            return f"`{thing!r}`"
    first = (inspect.getdoc(thing) or "").partition("\n\n")[0]
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
    matches = [name for name in domain.objects if name.endswith(f".{target}")]
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
    return True if generated or name in ("parent", "scope") else None


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
    signature = re.sub(r", parent=.*\)$", ")", signature)
    signature = re.sub(
        r"<(?:function|class) '?([\w.]+?)(?:\.<locals>.*?)?'?(?: at \w+)?>",
        r"\1",
        signature,
    )
    return signature, returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", _write_pages)
    app.connect("missing-reference", _find_object)
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("autodoc-process-signature", _shorten_signature)
    return {"parallel_read_safe": True}
