"""Choices in files: the user's cache, the tables shipped with the package, saved results. All have one JSON format."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from jaxsparse.tuning.key import SCHEMA, Choices, from_json, to_json

TABLES = pathlib.Path(__file__).parent / "tables"


def encode(choices: Choices, **facts: Any) -> str:
    """The text of a file: facts, then one choice a line."""
    head = json.dumps({"schema": SCHEMA, **facts}, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(to_json(key, choice)) for key, choice in choices.items())
    return f'{head},\n "choices": [\n{lines}\n ]\n}}\n'


def decode(text: str) -> tuple[Choices, dict[str, Any]]:
    """Choices and facts of a file's text.

    Raises:
      ValueError: says what is wrong with it.
    """
    try:
        facts = json.loads(text)
        entries, schema = facts.pop("choices"), facts.pop("schema")
        if schema != SCHEMA:
            raise ValueError(f"its schema is {schema!r}, this jaxsparse reads {SCHEMA}")
        return Choices(dict(map(from_json, entries))), facts
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no file of choices ({type(error).__name__}: {error})") from None


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


# --- the user's cache: a file a device kind ---


def _file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_").lower() + ".json"


def cache_path(device: str) -> pathlib.Path:
    """The user's cache file for a kind of device, under `$XDG_CACHE_HOME` (default `~/.cache`)."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxsparse" / "tuning" / _file_name(device)


def _read(path: pathlib.Path, remedy: str) -> Choices:
    try:
        return decode(path.read_text())[0]
    except FileNotFoundError:
        return Choices()
    except (OSError, ValueError) as error:
        warnings.warn(f"jaxsparse: {path} is not used: {error}. {remedy}", stacklevel=2)
        return Choices()


_added: dict[str, Choices] = {}  # by this process, for each kind of device
_adding = threading.Lock()


@functools.cache
def _cached(path: pathlib.Path, device: str) -> Choices:
    found = _read(path, "Kernels are chosen without it; the next tuning writes it anew.")
    return found | _added.get(device, Choices())


def cached(device: str) -> Choices:
    """The user's choices for a kind of device: what this process added, and else the file's.

    The file is read once a process, and anew after an addition, so that one program sees one state of it.
    """
    return _cached(cache_path(device), device)


def add_to_cache(device: str, choices: Choices) -> None:
    """Adds to the user's cache; what other processes write at the same time is kept.

    Where the file cannot be written, which it warns of, this process has the choices all the same.
    """
    path = cache_path(device)
    with _adding:
        _added[device] = _added.get(device, Choices()) | choices
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what cannot be read was warned of, and is replaced
            write(path, encode(_read(path, "") | choices, device=device))
    except OSError as error:
        warnings.warn(
            f"jaxsparse: the tuning cache {path} cannot be written ({error}); this process keeps the result, the next "
            "one will not find it. Set XDG_CACHE_HOME to a folder that can be written, or save the result to a file.",
            stacklevel=2,
        )
    _cached.cache_clear()


def forget() -> None:
    """As in a new process: drops what this one added, and reads the file again when it is next asked for."""
    _added.clear()
    _cached.cache_clear()


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- shipped tables ---


@functools.cache
def shipped(device: str) -> Choices:
    """The choices shipped for a kind of device, none for most."""
    return _read(table_path(device), "Reinstall jaxsparse.")


def table_path(device: str) -> pathlib.Path:
    """Where the table for a kind of device lies in the package."""
    return TABLES / _file_name(device)
