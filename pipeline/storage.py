"""Where data lies: a folder, or the URL of an object store such as s3://bucket/folder, behind the methods of pathlib.

URLs go through fsspec. Credentials and endpoint are found where its libraries look for them (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, ~/.aws), on every machine that reads or writes; they never stand in a recipe.
"""

import os
import posixpath
from pathlib import Path
from typing import IO, TypeAlias

from upath import UPath

from pipeline.errors import DataError

StoragePath: TypeAlias = Path | UPath


def is_url(where: str | StoragePath) -> bool:
    """Whether this is the URL of a store rather than a path of this machine."""
    return "://" in str(where)


def storage_path(where: str | StoragePath) -> StoragePath:
    """A path of this machine as pathlib has it, a URL as its counterpart with the same methods.

    Raises DataError for a URL that no installed package opens.
    """
    if isinstance(where, Path | UPath):
        return where
    if not is_url(where):
        return Path(where)
    if where.startswith("file://"):
        return Path(where.removeprefix("file://"))
    try:
        # Other processes write there too: a listing of a minute ago is no answer.
        return UPath(where, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"open {where}: {error}; expected a path, or a URL that fsspec opens (s3://bucket/folder works as "
            "installed, other stores need their package)"
        ) from error


def make_folder(path: StoragePath) -> None:
    """The folder is there afterwards; object stores have none to make."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def open_for_reading(path: StoragePath, block_bytes: int | None = None) -> IO[bytes]:
    """Open a file. A store is asked for at least `block_bytes` at a time; left to itself S3 hands out 50 MiB, so that a
    look at the header would fetch most videos whole.
    """
    if block_bytes is None or isinstance(path, Path):
        return path.open("rb")
    return path.open("rb", block_size=block_bytes)


def file_sizes(folder: StoragePath) -> dict[str, int]:
    """Name -> bytes of the files of a folder, in one listing; empty where there is no such folder."""
    try:
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        found = folder.fs.ls(folder.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {posixpath.basename(file["name"]): file["size"] for file in found if file["type"] == "file"}
