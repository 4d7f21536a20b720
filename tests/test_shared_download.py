"""
download.py against a server on this machine: cut connections, changed files, wrong checksums, archives that reach
outside.
"""

import hashlib
import http.server
import io
import stat
import tarfile
import threading
import zipfile
from types import SimpleNamespace

import pytest

from shared.data import download as downloads
from shared.data import iu_xray
from vqa_sft_grpo import sources as vqa
from shared.data.__main__ import main
from shared.data.download import fetch, find_folder, unpack
from shared.runtime import DataNotFound, InputError

BODY = bytes(range(256)) * 400  # 102,400 bytes
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    """
    files {path: bytes}; cut_after: end the connection after so many bytes, for the next `cuts` answers; requests: what
    was asked.
    """
    state = SimpleNamespace(files={}, cut_after=None, cuts=0, codes=[], ranges=True, etag='"one"', requests=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
            body = state.files.get(self.path)
            if state.codes or body is None:
                return self.send_error(state.codes.pop(0) if state.codes else 404)
            start = 0
            asked = self.headers.get("Range")
            if asked and state.ranges and self.headers.get("If-Range") in (None, state.etag):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            if state.etag:
                self.send_header("ETag", state.etag)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if state.cuts:
                state.cuts -= 1
                self.wfile.write(body[start : start + state.cut_after])
                self.close_connection = True
            else:
                self.wfile.write(body[start:])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        state.address = f"http://127.0.0.1:{http_server.server_address[1]}"
        yield state
        http_server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)


# ---------------------------------------------------------------------------------------------------------------- fetch


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path):
    server.files["/a.bin"] = BODY
    path = fetch(f"{server.address}/a.bin", tmp_path / "new" / "a.bin", SHA)
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    fetch(f"{server.address}/a.bin", path, SHA)
    assert len(server.requests) == 1


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    server.files["/a.bin"], server.cut_after, server.cuts = BODY, 30_000, 2
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin", SHA).read_bytes() == BODY
    assert [asked for _, asked, _ in server.requests] == [None, "bytes=30000-", "bytes=60000-"]
    assert server.requests[1][2] == '"one"'  # If-Range: only if it is still the same file


def test_a_later_call_fetches_it_whole(server, tmp_path):
    server.files["/a.bin"], server.cut_after, server.cuts = BODY, 30_000, 1
    with pytest.raises(DataNotFound, match=r"a.bin could not be downloaded .*30,000 of 102,400.*put it into"):
        fetch(f"{server.address}/a.bin", tmp_path / "a.bin", tries=1)
    assert not (tmp_path / "a.bin").exists()
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == BODY
    assert server.requests[-1][1] is None and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path, monkeypatch):
    server.files["/a.bin"], server.cut_after, server.cuts = BODY, 30_000, 1

    def change(seconds):
        server.files["/a.bin"], server.etag = BODY[::-1] + b"!", '"two"'

    monkeypatch.setattr(downloads.time, "sleep", change)
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == BODY[::-1] + b"!"


@pytest.mark.parametrize("what", ["ranges", "etag"])
def test_servers_that_cannot_resume_send_it_whole(server, tmp_path, what):
    server.files["/a.bin"], server.cut_after, server.cuts = BODY, 30_000, 1
    setattr(server, what, None)  # no parts at all; or no mark to tell one version from another
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == BODY
    if what == "etag":
        assert [asked for _, asked, _ in server.requests] == [None, None]


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    server.files["/a.bin"] = BODY + b"!"
    with pytest.raises(DataNotFound, match="is not the expected file"):
        fetch(f"{server.address}/a.bin", tmp_path / "a.bin", SHA)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match="delete it to download it again"):
        fetch(f"{server.address}/a.bin", tmp_path / "a.bin", SHA)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"


def test_a_missing_page_is_one_sentence_with_address_and_folder(server, tmp_path):
    with pytest.raises(DataNotFound) as stop:
        fetch(f"{server.address}/none.zip", tmp_path / "x" / "none.zip")
    assert (
        "404" in str(stop.value)
        and f"{server.address}/none.zip" in str(stop.value)
        and str(tmp_path / "x") in str(stop.value)
    )
    assert "\n" not in str(stop.value) and len(server.requests) == 1  # it will not appear by asking again


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.files["/a.bin"], server.codes = BODY, [503, 429]
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == BODY
    server.codes = [503] * 5
    with pytest.raises(DataNotFound, match="503"):
        fetch(f"{server.address}/a.bin", tmp_path / "b.bin")


def test_no_server_and_no_web_address(server, tmp_path):
    with pytest.raises(DataNotFound, match="no connection"):
        fetch("http://127.0.0.1:9/a.bin", tmp_path / "a.bin")
    with pytest.raises(InputError, match="not a web address"):
        fetch(f"file://{tmp_path}/a.bin", tmp_path / "b.bin")


# --------------------------------------------------------------------------------------------------------------- unpack


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def make_tar(path, members):
    """members: {name: bytes, or a TarInfo type with the place it points to}."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                info.type, info.linkname = data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


GOOD = {
    "imgs/a.jpg": b"first",
    "./imgs/deep/b.jpg": b"second",
    "__MACOSX/imgs/._a.jpg": b"rubbish",
    "imgs/.DS_Store": b"rubbish",
}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_unpack(make, tmp_path):
    archive, folder = make(tmp_path / "archive", GOOD), tmp_path / "here"
    (folder / "imgs").mkdir(parents=True)
    (folder / "imgs" / "a.jpg").write_bytes(b"older")
    (folder / "imgs" / "own.jpg").write_bytes(b"kept")
    assert unpack(archive, folder) == 2
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {"imgs/a.jpg": b"first", "imgs/deep/b.jpg": b"second", "imgs/own.jpg": b"kept"}
    assert [p.name for p in folder.iterdir()] == ["imgs"]  # no temporary folder is left


BAD_NAMES = [
    "../out.txt",
    "imgs/../../out.txt",
    "/tmp/out.txt",
    "..\\out.txt",
    "C:\\out.txt",
    "C:out.txt",
    "\\\\host\\out.txt",
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_names_that_lead_outside_are_refused(make, name, tmp_path):
    archive = make(tmp_path / "archive", {"good.txt": b"good", name: b"bad", "last.txt": b"good"})
    with pytest.raises(InputError, match="outside the folder"):
        unpack(archive, tmp_path / "in" / "here")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["archive"]  # not even the good ones


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind, tmp_path):
    archive = make_tar(tmp_path / "archive", {"good.txt": b"good", "link": (kind, "../outside")})
    with pytest.raises(InputError, match="a link or a special file"):
        unpack(archive, tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_links_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InputError, match="a link or a special file"):
        unpack(tmp_path / "archive", tmp_path / "here")


def test_damaged_archives_are_refused(tmp_path):
    noise = bytes(hashlib.sha256(bytes([i])).digest()[0] for i in range(250)) * 40
    for make in (make_zip, make_tar):
        whole = make(tmp_path / "whole", {f"{i}.bin": noise[i:] for i in range(5)}).read_bytes()
        (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match="is not an archive, or is damaged"):
            unpack(tmp_path / "cut", tmp_path / "here")
    page = tmp_path / "page.html"
    page.write_text("<html>please log in</html>")
    with pytest.raises(InputError, match="is not an archive"):
        unpack(page, tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_an_archive_that_fills_the_disk_is_refused(make, tmp_path):
    archive = make(tmp_path / "archive", {"zeros.bin": bytes(3_000_000)})
    assert archive.stat().st_size < 10_000
    with pytest.raises(InputError, match="unpacks to more than"):
        unpack(archive, tmp_path / "here", largest=2_000_000)


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_names_that_no_disk_takes_are_refused(make, tmp_path):
    with pytest.raises(InputError, match="more than 255 bytes"):
        unpack(make(tmp_path / "archive", {"ok.txt": b"x", "ü" * 128 + ".txt": b"x"}), tmp_path / "here")


# -------------------------------------------------------------------------------------------------- the sets' downloads


def test_download_iu_xray(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(iu_xray, "ADDRESS", f"{server.address}/")
    reports = make_tar(tmp_path / "r", {"ecgen-radiology/1.xml": b"<eCitation/>"}).read_bytes()
    server.files |= {
        "/NLMCXR_reports.tgz": reports,
        "/NLMCXR_png.tgz": make_tar(tmp_path / "p", {"CXR1_1_IM-0001-3001.png": b"png"}).read_bytes(),
    }
    with pytest.raises(DataNotFound, match="not the expected file"):  # the real archive has a known checksum
        iu_xray.download(tmp_path)
    monkeypatch.setitem(iu_xray.KNOWN, "NLMCXR_reports.tgz", hashlib.sha256(reports).hexdigest())
    server.cut_after, server.cuts = 50, 1
    folder = iu_xray.download(tmp_path, images=True)
    assert folder == tmp_path / "iu_xray" and (folder / "NLMCXR_reports.tgz").read_bytes() == reports
    assert [p.name for p in (folder / "NLMCXR_png").iterdir()] == ["CXR1_1_IM-0001-3001.png"]
    assert not (folder / "NLMCXR_png.tgz").exists()
    assert "indiana_projections.csv" in capsys.readouterr().out  # the archives do not say which film is frontal
    n = len(server.requests)
    iu_xray.download(tmp_path, images=True)
    assert len(server.requests) == n


def test_download_vqa_rad(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vqa, "RAD_ADDRESS", f"{server.address}/rad?zip=")
    server.files["/rad?zip="] = make_zip(
        tmp_path / "z", {vqa.PUBLIC: "[]", "VQA_RAD Image Folder/synpic1.jpg": b"jpg"}
    ).read_bytes()
    folder = vqa.download_vqa_rad(tmp_path)
    assert (folder / "VQA_RAD Image Folder" / "synpic1.jpg").read_bytes() == b"jpg" and not (
        folder / "VQA_RAD.zip"
    ).exists()
    assert "not byte for byte" in capsys.readouterr().out
    server.files["/rad?zip="] = make_zip(tmp_path / "z", {"other.txt": b""}).read_bytes()
    with pytest.raises(
        DataNotFound, match="has no VQA_RAD Dataset Public.json; get the files from https://osf.io/89kps/"
    ):
        vqa.download_vqa_rad(tmp_path / "again")


@pytest.mark.parametrize("top", ["", "imgs/"])
@pytest.mark.parametrize("name", ["validate.json", "validation.json"])
def test_download_slake(server, tmp_path, monkeypatch, top, name):
    monkeypatch.setattr(vqa, "SLAKE_ADDRESS", f"{server.address}/slake/")
    server.files = {f"/slake/{n}": n.encode() for n in ("train.json", "test.json", name)}
    server.files["/slake/imgs.zip"] = make_zip(tmp_path / "z", {f"{top}xmlab1/source.jpg": b"jpg"}).read_bytes()
    folder = vqa.download_slake(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["imgs", "test.json", "train.json", "validate.json"]
    assert (folder / "imgs" / "xmlab1" / "source.jpg").read_bytes() == b"jpg"


def test_the_command_ends_with_one_sentence(server, tmp_path, monkeypatch, refused, capsys):
    monkeypatch.setattr(vqa, "SLAKE_ADDRESS", f"{server.address}/slake/")
    assert f"{server.address}/slake/train.json" in refused(main, ["download", "slake", "--data-dir", tmp_path])
    server.files = {f"/slake/{n}.json": b"[]" for n in ("train", "validate", "test")}
    server.files["/slake/imgs.zip"] = make_zip(tmp_path / "z", {"imgs/xmlab1/source.jpg": b"jpg"}).read_bytes()
    main(["download", "slake", "--data-dir", str(tmp_path)])
    assert f"slake is in {tmp_path / 'slake'}" in capsys.readouterr().out


def test_find_folder(tmp_path):
    with pytest.raises(
        DataNotFound, match=r"SET is not in .*set1 \(looked for a.csv or b.csv\); get it from http://x and put"
    ):
        find_folder(tmp_path, ("set1",), ("a.csv", "b.csv"), "SET", "http://x")
    (tmp_path / "b.csv").touch()
    assert find_folder(tmp_path, ("set1",), ("a.csv", "b.csv"), "SET", "") == tmp_path
    (tmp_path / "set1").mkdir()
    (tmp_path / "set1" / "a.csv").touch()
    assert find_folder(tmp_path, ("set1",), ("a.csv", "b.csv"), "SET", "") == tmp_path / "set1"
