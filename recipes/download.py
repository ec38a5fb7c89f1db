"""Archives from the network: their sizes said first, resumed where they broke off, checked, whole or not there."""

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    url: str
    path: Path
    md5: str


class Unreachable(OSError):
    """No server answered."""


def say_size(urls: Sequence[str], folder: Path) -> None:
    """Asks the servers how large it all is, and says so; raises Unreachable."""
    sizes = []
    for url in urls:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
                sizes.append(int(answer.headers.get("Content-Length", 0)))
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from None
    hosts = ", ".join(sorted({str(urlsplit(url).hostname) for url in urls}))
    size = f"{sum(sizes) / 1e6:.1f} MB{' or more' if 0 in sizes else ''}"
    print(f"{len(urls)} to download from {hosts}, {size}, into {folder}", flush=True)


def fetch(archives: Sequence[Archive]) -> None:
    """Downloads those that are not there.

    Raises:
        Unreachable: before anything was downloaded.
        OSError: a download broke off; what came is kept, and the next call goes on after it.
        ValueError: what came has another checksum, and was removed.
    """
    absent = [archive for archive in archives if not archive.path.exists()]
    if absent:
        say_size([archive.url for archive in absent], absent[0].path.parent)
    for archive in absent:
        _download(archive)


def _download(archive: Archive) -> None:
    archive.path.parent.mkdir(parents=True, exist_ok=True)
    part = archive.path.with_name(f"{archive.path.name}.part")
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={there}-"} if there else {})
    print(f"  {archive.path.name}{f', from byte {there:,} on' if there else ''}", flush=True)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            resumed = answer.status == 206
            expected = int(answer.headers.get("Content-Length", 0)) + (there if resumed else 0)
            with part.open("ab" if resumed else "wb") as file:
                shutil.copyfileobj(answer, file)
        if part.stat().st_size < expected:
            raise http.client.IncompleteRead(b"")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left: it was whole when something stopped us
            raise
    except http.client.HTTPException:
        raise OSError(f"{archive.url} broke off at byte {part.stat().st_size:,}; call again to go on") from None
    found = md5(part)
    if found != archive.md5:
        part.unlink()
        raise ValueError(
            f"{archive.url}: md5 {found}, but it should be {archive.md5}; removed, call again to try again"
        )
    part.rename(archive.path)


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
