"""
Fetch the files of a public data set: a cut download goes on where it stopped, is checked, and is renamed into place
only when whole; archives are unpacked without letting a member out of its folder.

Usage:
    python -m shared.data.download vqa_rad --data-dir data  # or slake, iu_xray; --images adds the 14 GB of IU X-ray films
"""

import argparse
import gzip
import hashlib
import http.client
import json
import lzma
import os
import re
import shutil
import ssl
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from shared.runtime import InputError, read_json, script, write_json

BLOCK = 1 << 18  # bytes read at a time
RETRY_CODES = (408, 429, 500, 502, 503, 504)  # "try again later"; the others will not change
LARGEST = 64 << 30  # bytes an archive may unpack to; the largest of ours, the IU X-ray films, has about 14 GB


class DataNotFound(InputError):
    """The data set is neither there nor can it be downloaded."""


class CutShort(Exception):
    """The connection ended before the file did."""


# -------------------------------------------------------------------------------------------------------------- folders


def find_folder(data_dir, names, holding, what, address):
    """
    The first of <data_dir>/<name>, then data_dir itself, that has one of the files `holding`. DataNotFound, with the
    address and the folder to put the files in, when none has.
    """
    data_dir = Path(data_dir)
    for folder in [*(data_dir / name for name in names), data_dir]:
        if any((folder / name).exists() for name in holding):
            return folder
    raise DataNotFound(
        f"{what} is not in {data_dir / names[0]} (looked for {' or '.join(holding)}); get it from {address} and put the"
        " files into that folder"
    )


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- fetch


def fetch(address, path, sha256=None, tries=5, timeout=30, wait=1.0):
    """
    Download `address` to `path`; returns the path. A file that is there is kept when its checksum is right, or none is
    known. What has arrived stays in <path>.part, and the next try, or the next call, asks for the rest only; it starts
    anew when the server has another file by now. `timeout` and the first `wait` between tries are seconds; one process
    per file, please. DataNotFound, with the address and the folder, when it cannot be had or has the wrong checksum.
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
    part, note = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    for attempt in range(tries):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            fetch_rest(address, part, note, timeout, unmarked_ok=sha256 is not None)
            break
        except urllib.error.HTTPError as error:
            reason, again = f"the server answers {error.code} {error.reason}", error.code in RETRY_CODES
        except urllib.error.URLError as error:  # no connection at all
            reason, again = f"no connection: {error.reason}", False
        except (CutShort, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            reason, again = f"the connection was cut: {error}", True
        if not again or attempt + 1 == tries:
            raise DataNotFound(f"{path.name} could not be downloaded ({reason}); {by_hand}, or run again to go on")
    if sha256 and (found := sha256_of(part)) != sha256:
        part.unlink()
        note.unlink(missing_ok=True)
        raise DataNotFound(
            f"what {address} sent is not the expected file (sha256 {found[:12]}..., not {sha256[:12]}...); {by_hand}"
        )
    os.replace(part, path)
    note.unlink(missing_ok=True)
    return path


def fetch_rest(address, part, note, timeout, unmarked_ok):
    """
    One request for what `part` still lacks. `note` holds the mark (ETag or date) of the file that `part` is the
    beginning of: sent back as If-Range, it makes the server send the whole file when that has changed (RFC 9110, 13.1.5
    and 14).
    """
    known = {}
    if note.exists() and part.exists():
        try:
            known = read_json(note)
        except InputError:  # cut off while it was written
            known = {}
    have = part.stat().st_size if known.get("address") == address and (known.get("mark") or unmarked_ok) else 0
    headers = {"User-Agent": "Mozilla/5.0 (research data download)", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known.get("mark"):
            headers["If-Range"] = known["mark"]
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if (error.headers.get("Content-Range") or "").endswith(f"/{have}"):  # it had all arrived
            return
        part.unlink()
        raise CutShort("the file on the server is another one now") from error
    with response:
        total = response.headers.get("Content-Length")
        total = int(total) if total and total.isdigit() else None
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", (response.headers.get("Content-Range") or "").strip())
            if match is None or int(match[1]) != have:
                part.unlink()
                raise CutShort("the server sent another part of the file than asked for")
            total = None if match[2] == "*" else int(match[2])
        else:  # the whole file: the server cannot send parts, or the file has changed
            have = 0
            part.unlink(missing_ok=True)
            etag = response.headers.get("ETag") or ""
            mark = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
            write_json(note, {"address": address, "mark": mark})
        said = time.monotonic()
        with open(part, "ab") as file:
            while block := response.read(BLOCK):
                file.write(block)
                have += len(block)
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    print(
                        f"{part.stem}: {have / 2**20:,.0f} MiB{f' of {total / 2**20:,.0f}' if total else ''}",
                        flush=True,
                    )
    if total is not None and have != total:
        raise CutShort(f"{have:,} of {total:,} bytes have arrived")


# --------------------------------------------------------------------------------------------------------------- unpack


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
        temporary = Path(temporary)
        names, total = [], 0
        try:
            for name, size, open_member in members(archive):
                total += size
                if total > largest:
                    raise InputError(f"{archive} is refused: it unpacks to more than {largest / 2**30:,.1f} GiB")
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_member() as source, open(target, "wb") as file:
                    copied = copy_at_most(source, file, size)
                if copied != size:
                    raise InputError(
                        f"{archive} is damaged: {name} has {copied:,} bytes, not {size:,}; delete it and download it"
                        " again"
                    )
                names.append(name)
        except (
            tarfile.TarError,
            zipfile.BadZipFile,
            gzip.BadGzipFile,
            lzma.LZMAError,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise InputError(
                f"{archive} is not an archive, or is damaged; delete it and download it again ({error})"
            ) from error
        for name in dict.fromkeys(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(temporary / name, folder / name)
    return len(names)


def members(archive):
    """
    Yields (safe name, size in bytes, function that opens it) of each plain file. InputError for a member that is
    unsafe.
    """
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as file:  # knows gzip, bzip2 and xz by their content
            for info in file:
                if not (info.isreg() or info.isdir()):
                    raise InputError(f"{archive} is refused: its member {info.name!r} is a link or a special file")
                name = safe_name(info.name, archive)
                if name and info.isreg():
                    yield name, info.size, lambda info=info: file.extractfile(info)
    else:
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was made on Windows
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise InputError(f"{archive} is refused: its member {info.filename!r} is a link or a special file")
                name = safe_name(
                    info.orig_filename, archive
                )  # as stored: zipfile changes backslashes and cuts at a NUL
                if name and not info.is_dir():
                    yield name, info.file_size, lambda info=info: file.open(info)


def safe_name(name, archive):
    """
    './imgs/a.jpg' -> 'imgs/a.jpg'; '' for the folder itself and for what macOS adds. InputError for a name that leads
    elsewhere.
    """
    parts = [p for p in PurePosixPath(name).parts if p != "."]
    if (
        name.startswith(("/", "\\")) or ".." in parts or any(c in name for c in "\\:\0")
    ):  # a colon: C:file, or a stream on Windows
        raise InputError(f"{archive} is refused: its member {name!r} would be written outside the folder")
    if "__MACOSX" in parts or (parts and parts[-1] == ".DS_Store"):
        return ""
    return "/".join(parts)


def copy_at_most(source, file, size):
    """
    Copy, and stop soon after `size` bytes: a header that lies must not fill the disk. Returns the number of bytes
    copied.
    """
    copied = 0
    while copied <= size and (block := source.read(BLOCK)):
        file.write(block)
        copied += len(block)
    return copied


# -------------------------------------------------------------------------------------------------------------- command


@script
def main(argv=None):
    from shared.data import iu_xray
    from vqa_sft_grpo import sources as vqa  # here, since they import this file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", choices=["iu_xray", "vqa_rad", "slake"], help="data set to fetch")
    # fmt: off
    parser.add_argument("--data-dir", metavar="DIR", default=os.environ.get("MEDVLM_DATA") or "data",
        help="folder of all data sets; $MEDVLM_DATA, else data (%(default)s)")
    parser.add_argument("--images", action="store_true",
        help="iu_xray: the films too, about 14 GB; the other sets always come with theirs")
    # fmt: on
    args = parser.parse_args(argv)
    if args.data == "iu_xray":
        folder = iu_xray.download(args.data_dir, images=args.images)
    else:
        folder = {"vqa_rad": vqa.download_vqa_rad, "slake": vqa.download_slake}[args.data](args.data_dir)
    print(json.dumps(sorted(p.name for p in folder.iterdir())))
    print(f"{args.data} is in {folder}")


if __name__ == "__main__":
    main()
