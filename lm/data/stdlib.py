"""`stdlib`: the documentation and source of the Python that runs this, a corpus on every machine.

The language reference's topics, the docstrings of the modules written in C, and every source file
of the standard library with its tests: about 30 MB for CPython 3.11. Installed packages are left
out, so that the corpus depends on the Python version only.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import itertools
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from typing import Any

from lm.data.files import CorpusReport

_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__")
_READER = "63e9f43d0faaa68c83e845b1654d5261"  # changed when the same files give other documents


def documents(report: CorpusReport) -> Iterator[str]:
    """One per help topic, C module and source file, each kind in alphabetical order."""
    texts = [*_topics(), *filter(None, map(_docstrings, sorted(sys.builtin_module_names)))]
    for text in itertools.chain(texts, _sources(report)):
        report.num_documents += 1
        yield text


def fingerprint() -> dict[str, Any]:
    """The Python version and the names and sizes of the files."""
    root = sysconfig.get_paths()["stdlib"]
    listing = [(os.path.relpath(p, root), os.path.getsize(p)) for p in source_files(root)]
    return {
        "corpus": "stdlib",
        "python": f"{sys.implementation.name} {sys.version}",
        "files": hashlib.blake2b(repr(listing).encode(), digest_size=16).hexdigest(),
        "reader": _READER,
    }


def _sources(report: CorpusReport) -> Iterator[str]:
    root = sysconfig.get_paths()["stdlib"]
    for path in source_files(root):
        # Some files of the test suite are mis-encoded on purpose; nobody can mend them, so they
        # are left out even where bad files are to be refused.
        try:
            with open(path, "rb") as file:
                data = file.read()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            text = data.decode(encoding)
        except (OSError, SyntaxError, UnicodeDecodeError, LookupError):
            report.skip(os.path.relpath(path, root), "mis-encoded")
            continue
        if text.strip():
            yield text


def source_files(root: str) -> list[str]:
    """Every .py file below `root`, sorted, without installed packages."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        found += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _topics() -> Iterator[str]:
    """The pages of `help("if")` and the like: the language reference in plain text."""
    try:
        from pydoc_data import topics
    except ImportError:  # left out of some minimal installations
        return
    for name in sorted(topics.topics):
        yield topics.topics[name]


def _docstrings(name: str) -> str:
    """Names, signatures and docstrings of a module that has no Python source."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return ""
    entries = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
    for member, value in sorted(vars(module).items()):
        public = not member.startswith("_")
        if not public or getattr(value, "__module__", name) not in (name, None):
            continue
        if not callable(value):
            continue
        entries.append(_entry(member, value))
        if inspect.isclass(value):
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and callable(function):
                    entries.append(_entry(f"{member}.{method}", function))
    # Addresses in default values would make the corpus differ from run to run.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", "\n\n".join(filter(None, entries)))


def _entry(name: str, value: Any) -> str:
    doc = inspect.getdoc(value)
    if not doc:
        return ""
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError):
        signature = ""
    return f"{name}{signature}\n    " + doc.replace("\n", "\n    ")
