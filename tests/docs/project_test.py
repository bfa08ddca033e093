"""What the project says of itself in several places agrees."""

import re
import tomllib

import pconv_jax
from pconv_jax.runs.settings import FIELDS
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
URLS = PROJECT["urls"]
README = (ROOT / "README.md").read_text()


def test_one_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    changed = headings[0] == "Unreleased"
    released = headings[1 if changed else 0]
    assert f"\nversion: {released}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{released}}}" in (ROOT / "docs" / "citing.md").read_text()
    # Between two releases, the version is that of the next one, in development.
    version, *development = pconv_jax.__version__.partition(".dev")
    assert "".join(development) == (".dev0" if changed else "")
    numbers, before = (tuple(map(int, v.split("."))) for v in (version, released))
    assert numbers > before if changed else numbers == before


def test_links_of_the_readme_are_absolute_and_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://"), link
    source = URLS["Source"].removeprefix("https://github.com/")
    files = rf"https://(?:raw\.githubusercontent\.com/{source}/main|github\.com/{source}/blob/main)/(.+)"
    pages = rf"{URLS['Documentation']}/([\w/]+)\.html(?:#([\w-]+))?$"
    local = [link for link in links if source.lower() in link.lower().replace("_", "-")]
    for link in local:
        if match := re.match(files, link):
            assert (ROOT / match[1]).is_file(), link
        elif match := re.match(pages, link):
            check_page(match[1], match[2])
        else:
            assert link in URLS.values() or "github.io" in link, link


def check_page(page, anchor):
    if page.startswith("api/"):  # The build writes it.
        return
    path = ROOT / "docs" / f"{page}.md"
    assert path.is_file(), page
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    assert anchor is None or anchor in anchors, (page, anchor)


def test_the_guide_shows_every_setting():
    text = (ROOT / "docs" / "train.md").read_text()
    shown = re.findall(r"```\{settings-table\} ?(\w*)", text)
    sections = {name.rpartition(".")[0] for name in FIELDS}
    assert sorted(shown) == sorted(sections)


def test_every_example_is_a_page():
    index = (ROOT / "docs" / "index.md").read_text()
    examples = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    assert examples == sorted(re.findall(r"^notebooks/(\w+)$", index, re.M))
