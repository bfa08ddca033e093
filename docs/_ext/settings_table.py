"""The directive ``settings-table``: settings with their type, default and range."""

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pconv_jax.runs.fields import Field
from pconv_jax.runs.settings import FIELDS


class SettingsTable(SphinxDirective):
    """Shows the settings of one section, or those of no section."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Make the table."""
        section = self.arguments[0] if self.arguments else ""
        fields = [f for name, f in FIELDS.items() if _section(name) == section]
        if not fields:
            raise self.error(f"no settings are in the section {section!r}")
        rows = ["| Setting | Type | Default | |", "|---|---|---|---|"]
        rows += map(_row, fields)
        node = nodes.container()
        self.state.nested_parse(StringList(rows), 0, node)
        return node.children


def _section(name: str) -> str:
    return name.rpartition(".")[0]


def _row(field: Field) -> str:
    kind = field.type_name.replace(" | ", ", ")
    kind += " or none" if field.optional else ""
    kind += f" in {field.within}".replace("inf", "∞") if field.within else ""
    default = "none" if field.default is None else field.default
    resumable = " *May change when a run is resumed.*" if field.resumable else ""
    text = field.description.replace("2**", "2\\*\\*") + resumable
    return f"| `{field.name}` | {kind.replace('**', '^')} | `{default}` | {text} |"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("settings-table", SettingsTable)
    return {"parallel_read_safe": True}
