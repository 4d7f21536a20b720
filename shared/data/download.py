"""
Files of a public data set: found on disk, fetched, checked and renamed into place only when whole, unpacked without
letting a member out of the folder. `python -m shared.data download NAME` uses all of it.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import hashlib
import http.client
import os
import re
import shutil
import ssl
import stat
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from shared.runtime import DataNotFound, InputError

RETRY_CODES = (408, 429, 500, 502, 503, 504)  # "try again later"; the others will not change
LARGEST = 64 << 30  # bytes an archive may unpack to; the largest of ours, the IU X-ray films, has about 14 GB
HEADERS = {"User-Agent": "Mozilla/5.0 (research data download)", "Accept-Encoding": "identity"}


def find_folder(data_dir, names, holding, what, address, known=Path.exists):
    """
    The first of <data_dir>/<name>, then data_dir itself, that has one of the files `holding`, and `known` says so of
    it. DataNotFound, with the address and the folder to put the files in, when none has.
    """
    data_dir = Path(data_dir)
    for folder in [*(data_dir / name for name in names), data_dir]:
        if any((folder / name).exists() and known(folder / name) for name in holding):
            return folder
    raise DataNotFound(
        f"{what} is not in {data_dir / names[0]} (looked for {' or '.join(holding)}); get it from {address} and put the"
        " files into that folder"
    )


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(address, path, sha256=None, tries=5, timeout=30, wait=1.0):
    """
    Download `address` to `path`; returns the path. A file that is there is kept when its checksum is right, or none is
    known. What has arrived stays in <path>.part: after a cut, the next of the `tries` asks for the rest only, where the
    server marks its files and sends parts (RFC 9110, 13.1.5 and 14), and starts anew elsewhere. `timeout` and the first
    `wait` between tries are seconds; one process per file, please. DataNotFound, with the address and the folder, when
    it cannot be had or has the wrong checksum. (torch.hub.download_url_to_file takes a cut file for a whole one.)
    """
    path = Path(path)
    by_hand = f"fetch {address} by hand and put it into {path.parent} as {path.name}"
    if not re.match(r"https?://", address):
        raise InputError(f"{address} is not a web address (http or https)")
    if path.is_file():
        if sha256 and sha256_of(path) != sha256:
            raise InputError(f"{path} is not the expected file, its sha256 differs; delete it to download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, mark = path.with_name(path.name + ".part"), None
    for attempt in range(tries):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            have = part.stat().st_size if mark else 0
            headers = HEADERS | ({"Range": f"bytes={have}-", "If-Range": mark} if have else {})
            request = urllib.request.Request(address, headers=headers)
            with urllib.request.urlopen(request, timeout=timeout) as response:
                if response.status != 206:  # the whole file: the server knows no parts, or has another file by now
                    have = 0
                elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
                    mark = None
                    raise ConnectionError("the server sent another part of the file than asked for")
                mark, total = response.headers.get("ETag"), response.headers.get("Content-Length")
                mark = None if (mark or "W/").startswith("W/") else mark  # a weak mark does not vouch for every byte
                bar = tqdm(desc=path.name, unit="B", unit_scale=True, initial=have, total=total and have + int(total))
                bar.mininterval = 0.5 if sys.stderr.isatty() else 30  # seconds
                with bar, open(part, "ab" if have else "wb") as file:
                    while block := response.read(1 << 18):
                        bar.update(file.write(block))
            if total and part.stat().st_size != have + int(total):
                raise ConnectionError(f"{part.stat().st_size:,} of {have + int(total):,} bytes have arrived")
            break
        except urllib.error.HTTPError as error:
            reason, again = f"the server answers {error.code} {error.reason}", error.code in RETRY_CODES
        except urllib.error.URLError as error:  # no connection at all
            reason, again = f"no connection: {error.reason}", False
        except (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            reason, again = f"the connection was cut: {error}", True
        if not again or attempt + 1 == tries:
            raise DataNotFound(f"{path.name} could not be downloaded ({reason}); {by_hand}, or try again")
    if sha256 and (found := sha256_of(part)) != sha256:
        part.unlink()
        raise DataNotFound(
            f"what {address} sent is not the expected file (sha256 {found[:12]}..., not {sha256[:12]}...); {by_hand}"
        )
    os.replace(part, path)
    return path


def unpack(archive, folder, largest=LARGEST):
    """
    Unpack a zip or tar archive into `folder`; returns how many files it had. InputError, with nothing written, when it
    is damaged, unpacks to more than `largest` bytes, or has a member that is a link or a device or would leave the
    folder.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # All of it goes to a folder beside the old files first: one bad member at the end must not leave the others behind.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
        try:
            with tarfile.open(archive) if tarfile.is_tarfile(archive) else zipfile.ZipFile(archive) as file:
                wanted, total = [], 0
                for member, name, size, is_plain in members(file):
                    if not is_plain:
                        raise InputError(f"{archive} is refused: its member {name!r} is a link or a special file")
                    check_name(name, archive)
                    if total + size > largest:
                        raise InputError(f"{archive} is refused: it unpacks to more than {largest / 2**30:,.1f} GiB")
                    if "__MACOSX" not in Path(name).parts and Path(name).name != ".DS_Store":  # what macOS adds
                        wanted.append(member)
                        total += size
                options = {"filter": "data"} if isinstance(file, tarfile.TarFile) else {}
                for member in wanted:  # neither library writes more bytes than the member says it has
                    file.extract(member, temporary, **options)
        except InputError:
            raise
        except OSError as error:
            if error.errno is not None:  # of the disk, not of the archive
                raise
            raise InputError(f"{archive} is damaged; delete it and download it again ({error})") from error
        except Exception as error:  # tarfile, zipfile, gzip, lzma and zlib raise a dozen kinds for damaged archives
            reason = f"is not an archive, or is damaged; delete it and download it again ({error})"
            raise InputError(f"{archive} {reason}") from error
        names = [path.relative_to(temporary) for path in sorted(Path(temporary).rglob("*")) if path.is_file()]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(temporary, name), folder / name)
    return len(names)


def members(file):
    """Yields (member, name as stored, size in bytes, whether it is a plain file or a folder)."""
    if isinstance(file, tarfile.TarFile):
        for info in file:
            yield info, info.name, info.size, info.isreg() or info.isdir()
    else:
        for info in file.infolist():  # zipfile changes backslashes in the name and cuts it at a NUL
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was made on Windows
            yield info, info.orig_filename, info.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR)


def check_name(name, archive):
    """InputError for a name that leads out of the folder (a colon: C:file, or a stream on Windows), or is too long."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or any(c in name for c in "\\:\0"):
        raise InputError(f"{archive} is refused: its member {name!r} would be written outside the folder")
    if any(len(os.fsencode(part)) > 255 for part in parts):
        raise InputError(f"{archive} is refused: a name of more than 255 bytes, {name[:40]}..., cannot be written")
