"""Folders that are there whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from neat_kernels.adapters.errors import AdapterError
from neat_kernels.files import umask

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_destination(folder: Path, overwrite: bool, replaceable: Collection[str]) -> None:
    """Raise AdapterError unless a folder can be written there.

    Args:
        folder: may be missing or empty; else `overwrite` is needed.
        overwrite: whether what is there may be replaced.
        replaceable: names of the files that may be there then.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise AdapterError(f"{folder}: expected a folder or a free name, got a link or a file")
    if folder.exists() and folder.samefile(Path.cwd()):
        raise AdapterError(f"{folder}: expected another folder than the current one, whose place a new one takes")
    there = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if there and not overwrite:
        raise AdapterError(f"{folder} is not empty: expected a new folder, or overwrite=True to replace an adapter")
    if foreign := [name for name in there if name not in replaceable]:
        raise AdapterError(
            f"{folder}: expected nothing but the files of an adapter ({', '.join(sorted(replaceable))}), "
            f"got {', '.join(foreign[:5])} too, which replacing the folder would lose"
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block has ended without an error.

    An older folder of that name is exchanged for it in one system call on Linux. Elsewhere, and on file systems that
    cannot, two renames follow each other; the older folder has a name that begins with a dot between them.

    Args:
        folder: checked by `check_destination`.

    Returns:
        The path to write into.

    Raises:
        OSError: the disk is full or cannot be written, whichever library has found out.
    """
    from safetensors import SafetensorError

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.writing-"))
    try:
        yield temporary
        # mkdtemp makes a folder that only its owner enters.
        temporary.chmod(0o777 & ~umask())
        for path in temporary.rglob("*"):
            _flush(path)
        _flush(temporary)
        _take_place(temporary, folder)
        _flush(folder.parent)
    except SafetensorError as error:
        raise OSError(f"{folder.name} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        # rename(2) replaces an empty folder; Windows wants it gone.
        with suppress(OSError):
            folder.rmdir()
        temporary.rename(folder)
    elif not _exchange(temporary, folder):
        older = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.older-"))
        folder.rename(older / folder.name)
        try:
            temporary.rename(folder)
        except BaseException:
            (older / folder.name).rename(folder)
            raise
        shutil.rmtree(older, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
