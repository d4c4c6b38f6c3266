"""The default task: tell from a docstring which installed library it was written for."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from neat_kernels.files import write_atomically
from neat_kernels.finetune.data import TextData, digest, split_rows
from neat_kernels.usage import UsageError

# Each comes with the extras hf and cli: torch brings sympy and networkx, transformers brings numpy and huggingface_hub.
LIBRARIES = ("huggingface_hub", "matplotlib", "networkx", "numpy", "peft", "sympy", "torch", "transformers")
NAMES = r"hugging[ _]?face(?:[ _-]?hub)?|matplotlib|networkx|numpy|peft|sympy|pytorch|torch|transformers"
SHORT_NAMES = r"hf|hub|mpl|pyplot|plt|nx|np"
TEXTS_PER_LIBRARY = 760
CANDIDATES_PER_LIBRARY = 2 * TEXTS_PER_LIBRARY
MIN_CHARACTERS, MAX_CHARACTERS = 40, 400
# A model that sees some 48 tokens sees about this much: two texts that begin alike are the same text to it.
SAME_BEGINNING = 100
MAX_FILE_BYTES = 1_000_000
VALIDATION_SHARE, TEST_SHARE = 1 / 12, 1 / 4
FORMAT = 1

_MASKED = re.compile(rf"{NAMES}|(?<![a-z0-9])(?:{SHORT_NAMES})(?![a-z0-9])", re.IGNORECASE)
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def load_docstrings(progress: Callable[[str], None] = lambda library: None) -> TextData:
    """Docstrings of the installed libraries, labelled by library, with the libraries' names masked.

    Args:
        progress: called with the name of each library before it is read; not called when the cache answers.

    Returns:
        About 4,000 training, 500 validation and 1,500 test texts; the same for the same library versions.

    Raises:
        UsageError: if one of the libraries is not installed.
    """
    versions = {library: installed_version(library) for library in LIBRARIES}
    path = cache_folder() / f"docstrings-{cache_key(versions)}.json"
    texts = read_cache(path)
    notes: tuple[str, ...] = ()
    if texts is None:
        texts = {}
        for library in LIBRARIES:
            progress(library)
            texts[library] = sample_docstrings(library)
        notes = store_cache(path, texts)
    rows = drop_shared_beginnings(texts)
    source = f"docstrings of {', '.join(f'{name} {version}' for name, version in versions.items())}"
    return split_rows(rows, source=source, validation=VALIDATION_SHARE, test=TEST_SHARE, notes=notes)


def installed_version(library: str) -> str:
    """The version of an installed library, found without importing it."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError as error:
        raise UsageError(
            f"the default data needs {', '.join(LIBRARIES)}, but {library} is not installed: "
            "pip install 'neat-kernels[hf,cli]', or name a file with --data"
        ) from error


def sample_docstrings(library: str) -> list[str]:
    """Masked docstrings of one library, files taken in an order given by a hash until there are enough."""
    found: dict[str, str] = {}
    for path in source_files(library):
        for text in docstrings(path):
            found.setdefault(beginning(text), text)
        if len(found) >= CANDIDATES_PER_LIBRARY:
            break
    return sorted(found.values(), key=digest)[:TEXTS_PER_LIBRARY]


def source_files(library: str) -> list[Path]:
    """The library's Python files without its tests, in an order that depends on their names alone."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"{library} is installed but its source folder cannot be found")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [path for path in root.rglob("*.py") if "tests" not in path.relative_to(root).parts]
    small = [path for path in files if path.stat().st_size <= MAX_FILE_BYTES]
    return sorted(small, key=lambda path: digest(path.relative_to(root).as_posix()))


def docstrings(path: Path) -> Iterator[str]:
    """Yield the masked docstrings of one file that are long enough to be judged."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other Python versions are shipped as .py too
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, _DEFINITIONS) else None
        if text is not None:
            masked = mask(" ".join(text.split()))[:MAX_CHARACTERS]
            if len(masked) >= MIN_CHARACTERS:
                yield masked


def mask(text: str) -> str:
    """The text with every library name, in any spelling, replaced by the word `library`."""
    return _MASKED.sub("library", text)


def beginning(text: str) -> str:
    """What two texts share if a model that reads only their beginning cannot tell them apart."""
    return re.sub(r"[^a-z]+", " ", text.lower())[:SAME_BEGINNING]


def drop_shared_beginnings(texts: dict[str, list[str]]) -> list[tuple[str, str]]:
    """(text, library) pairs, without the beginnings that several libraries share."""
    owners: dict[str, set[str]] = {}
    for library, found in texts.items():
        for text in found:
            owners.setdefault(beginning(text), set()).add(library)
    return [(text, name) for name, found in texts.items() for text in found if len(owners[beginning(text)]) == 1]


def cache_folder() -> Path:
    """The folder for cached data: $NEAT_KERNELS_CACHE, or the platform's own place for caches."""
    if chosen := os.environ.get("NEAT_KERNELS_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "neat-kernels"


def cache_key(versions: dict[str, str]) -> str:
    """A name for what decides the texts: library versions, Python's grammar and the constants of this file."""
    recipe = [FORMAT, versions, list(sys.version_info[:2]), NAMES, SHORT_NAMES, TEXTS_PER_LIBRARY]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def read_cache(path: Path) -> dict[str, list[str]] | None:
    """The cached texts, or None if there are none or the file is damaged."""
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(texts, dict) and list(texts) == list(LIBRARIES)
    return texts if whole and all(isinstance(found, list) and found for found in texts.values()) else None


def store_cache(path: Path, texts: dict[str, list[str]]) -> tuple[str, ...]:
    """Write the cache; a note says so where it cannot be written, since the run does not depend on it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(texts).encode())
    except OSError as error:
        return (f"the docstrings could not be cached: {error}",)
    return ()
