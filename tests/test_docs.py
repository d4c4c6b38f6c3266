"""The documentation says what the code does: its code runs, its signatures are the code's, its links lead somewhere."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import neat_kernels as nk
from neat_kernels.vocabulary import ACTIVATIONS, BACKENDS, ORIENTATIONS

ROOT = Path(__file__).resolve().parent.parent
README, API, PEFT = ROOT / "README.md", ROOT / "docs" / "api.md", ROOT / "docs" / "peft.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ("functional", "reference")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(text, language):
    """Position and source of each fenced block of one language."""
    return [(m.start(2), m[2]) for m in FENCE.finditer(text) if m[1] == language]


def without_code(text):
    return FENCE.sub("", text)


def section(text, title):
    """What stands below a heading, up to the next one of its level or above."""
    level, start = next((len(m[1]), m.end()) for m in HEADING.finditer(text) if m[2] == title)
    ends = (m.start() for m in HEADING.finditer(text, start) if len(m[1]) <= level)
    return text[start : next(ends, len(text))]


def documented_signatures():
    """Name and parameters, as (name, kind, default as source), of each signature block in the API page."""
    found = {}
    for _, source in blocks(read(API), "text"):
        function = ast.parse(f"def {source.strip()}: pass").body[0]
        assert isinstance(function, ast.FunctionDef)
        found[function.name] = parameters_of(function.args)
    return found


def parameters_of(args):
    defaults = [None] * (len(args.args) - len(args.defaults)) + [ast.literal_eval(d) for d in args.defaults]
    positional = [
        (a.arg, "positional", i >= len(args.args) - len(args.defaults), d)
        for i, (a, d) in enumerate(zip(args.args, defaults, strict=True))
    ]
    keyword = [
        (a.arg, "keyword", d is not None, None if d is None else ast.literal_eval(d))
        for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return positional + keyword


def actual_parameters(function):
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return [
        (
            p.name,
            "keyword" if p.kind is p.KEYWORD_ONLY else "positional",
            p.default is not p.empty,
            None if p.default is p.empty else default_value(function, p),
        )
        for p in parameters
    ]


def default_value(function, parameter):
    # A dataclass shows a marker in place of the value that its factory makes.
    for field in fields(nk.NeatConfig) if function is nk.NeatConfig else ():
        if field.name == parameter.name and callable(field.default_factory):
            return field.default_factory()
    return parameter.default


CALLABLES = {
    "NeatConfig": nk.NeatConfig,
    "FusedNeatLinear": nk.FusedNeatLinear,
    "FusedLoraLinear": nk.FusedLoraLinear,
    "from_linear": nk.FusedNeatLinear.from_linear,
    **{name: getattr(nk, name) for name in nk.__all__ if inspect.isfunction(getattr(nk, name))},
    **{name: getattr(nk.functional, name) for name in nk.functional.__all__},
}


@pytest.mark.parametrize("page", [README, API, PEFT], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = read(page)
    namespace = {"__name__": page.stem}
    found = blocks(text, "python")
    assert found
    for position, source in found:
        # The newlines put the line numbers of the page into a traceback.
        lines = "\n" * text.count("\n", 0, position)
        exec(compile(lines + source, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", CALLABLES)
def test_documented_signature_is_the_code_s(name):
    assert documented_signatures()[name] == actual_parameters(CALLABLES[name])


def test_no_signature_of_something_that_is_gone():
    assert set(documented_signatures()) == set(CALLABLES)


def test_every_public_name_has_a_section():
    headings = [m[2] for m in HEADING.finditer(read(API))]
    names = [name for name in nk.__all__ if name != "functional"]
    names += [f"functional.{name}" for name in nk.functional.__all__]
    assert [name for name in names if f"`{name}`" not in headings] == []


def test_every_public_attribute_of_the_layer_is_documented():
    text = section(read(API), "`FusedNeatLinear`")
    own = [kind for kind in nk.FusedNeatLinear.__mro__ if kind.__module__.startswith("neat_kernels.")]
    public = [name for kind in own for name in vars(kind) if not name.startswith("_")]
    assert {"merge", "base_weight", "explain"} <= set(public)
    assert [name for name in public if not re.search(rf"`(FusedNeatLinear\.)?{name}[`(]", text)] == []


def test_every_field_of_the_configuration_is_documented():
    text = section(read(API), "`NeatConfig`")
    assert [field.name for field in fields(nk.NeatConfig) if f"| `{field.name}` |" not in text] == []


@pytest.mark.parametrize("page", [README, API, ROOT / "docs" / "math.md"], ids=lambda page: page.name)
def test_every_activation_and_orientation_is_named(page):
    text = read(page)
    assert [name for name in ACTIVATIONS if f"`{name}`" not in text] == []
    assert [name for name in ORIENTATIONS if f'`"{name}"`' not in text and f"`{name}`" not in text] == []


def test_every_backend_is_documented():
    text = section(read(API), "Backends")
    assert [name for name in BACKENDS if f'"{name}"' not in text] == []


def test_state_dict_names_are_those_documented():
    layer = nk.FusedNeatLinear(4, 6, r=2, depth=2)
    documented = re.findall(r"`([\w.]+)`", "".join(re.findall(r"^\| (`.*?) \|", state_dict_section(), re.MULTILINE)))
    names = {re.sub(r"\.\d+$", ".i", name) for name in layer.state_dict()}
    assert names == set(documented)


def state_dict_section():
    return section(read(API), "State dicts")


def test_readme_sets_up_with_exactly_two_commands():
    commands = [
        line for _, source in blocks(section(read(README), "Set-up"), "bash") for line in source.splitlines() if line
    ]
    assert commands == ["make demo", "make test"]
    targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE)
    assert {command.removeprefix("make ") for command in commands} <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    for target in LINK.findall(without_code(read(page))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def anchors(page):
    """The anchors of a page's headings, as GitHub derives them."""
    titles = (m[2] for m in HEADING.finditer(without_code(read(page))))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_reached_from_the_readme():
    linked = {(README.parent / target).resolve() for target in LINK.findall(read(README))}
    assert [page.name for page in PAGES if page != README and page not in linked] == []
    assert [script.name for script in sorted((ROOT / "examples").glob("*.py")) if script not in linked] == []


def layers():
    """The row of the design page's table that each file or folder of the package is in, counted from the top."""
    table = section(read(ROOT / "docs" / "design.md"), "Layers")
    rows = [re.findall(r"`([\w./]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    return {place.removesuffix(".py").rstrip("/"): i for i, row in enumerate(rows) for place in row}


def imported(source):
    """The files and folders of the package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "neat_kernels":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("neat_kernels."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("neat_kernels."))


def test_imports_point_downward_as_the_table_of_layers_says():
    rows, package = layers(), ROOT / "neat_kernels"
    for path in package.rglob("*.py"):
        place = path.relative_to(package).parts[0].removesuffix(".py")
        above = [other for other in imported(read(path)) if rows[other] < rows[place]]
        # It asks these two what was measured or predicted, as the page says.
        assert set(above) <= ({"model", "kernels"} if place == "plan" else set()), path
