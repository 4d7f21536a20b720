"""iu_xray.py: made-up studies in every layout, and the real files with the counts that are known of them."""

import io
import json
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from shared.data import audit as audits
from shared.data.audit import image_hash, linked_groups, near_pairs, repeats, seen, shared_between_splits
from shared.data.audit import similar_images, split_groups
from shared.data.__main__ import main as audit_main
from shared.data.images import read_image
from shared.data.iu_xray import add_image_paths, audit, load_gold_labels, load_iu_xray
from shared.data.iu_xray import plain_name, read_reports, rexrank_entries
from shared.metrics.text import clean_r2gen
from shared.runtime import DataNotFound, InputError

# uid: (MeSH terms, indication, findings, impression, films)
STUDIES = {
    1: (
        ["normal"],
        "Cough & fever",
        "Lungs are clear. No effusion.",
        "Normal chest.",
        ["1_IM-0001-3001 Lateral", "1_IM-0001-4001 Frontal"],
    ),
    2: (
        ["Cardiomegaly/mild", "Opacity/lung"],
        "+PPD",
        "Heart is large.",
        "Cardiomegaly.",
        ["2_IM-0652-1001 Frontal", "2_IM-0652-2001 Lateral"],
    ),
    3: (["normal"], "", "", "No acute disease.", ["3_IM-1384-1001 Frontal"]),
    4: (["Nodule/lung"], "", "A nodule, 5 mm.", "", ["4_IM-2050-1001 Lateral"]),
    5: (
        ["normal"],
        "",
        "Lungs are clear. No  effusion.",
        "Normal.",
        ["5_IM-2117-1001 Frontal", "5_IM-2117-1002 Frontal"],
    ),
    6: (["normal"], "", "Clear.", "Normal.", ["6_IM-2192-1001 Frontal"]),
}


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def write_csv(folder, studies=STUDIES):
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["uid,MeSH,Problems,image,indication,comparison,findings,impression"]
    for uid, (mesh, indication, findings, impression, _) in studies.items():
        indication = "#NAME?" if indication.startswith("+") else indication
        lines.append(
            ",".join(
                [
                    str(uid),
                    ";".join(mesh),
                    ";".join(m.split("/")[0] for m in mesh),
                    "PA",
                    quoted(indication),
                    "",
                    quoted(findings),
                    quoted(impression),
                ]
            )
        )
    (folder / "indiana_reports.csv").write_text("\n".join(lines) + "\n")
    films = [f"{uid},{film.replace(' ', '.dcm.png,')}" for uid, study in studies.items() for film in study[-1]]
    (folder / "indiana_projections.csv").write_text("uid,filename,projection\n" + "\n".join(films) + "\n")


def xml_of(uid):
    mesh, indication, findings, impression, films = STUDIES[uid]
    texts = {
        "COMPARISON": "",
        "INDICATION": indication.replace("&", "&amp;"),
        "FINDINGS": findings,
        "IMPRESSION": impression,
    }
    abstract = "".join(f'<AbstractText Label="{label}">{text}</AbstractText>' for label, text in texts.items())
    images = "".join(f'<parentImage id="CXR{"1_" if uid == 1 else ""}{film.split()[0]}"/>' for film in films)
    terms = "".join(f"<major>{term}</major>" for term in mesh)
    return (
        '<?xml version="1.0"?><eCitation><uId'
        f' id="CXR{uid}"/><Article>{abstract}</Article><MeSH>{terms}<automatic>x</automatic></MeSH>{images}</eCitation>'
    )


def write_xml(folder, archive=True):
    folder.mkdir(parents=True, exist_ok=True)
    if not archive:
        (folder / "ecgen-radiology").mkdir()
        for uid in STUDIES:
            (folder / "ecgen-radiology" / f"{uid}.xml").write_text(xml_of(uid))
        return
    with tarfile.open(folder / "NLMCXR_reports.tgz", "w:gz") as file:
        for uid in reversed(STUDIES):  # any order
            info = tarfile.TarInfo(f"ecgen-radiology/{uid}.xml")
            info.size = len(xml_of(uid))
            file.addfile(info, io.BytesIO(xml_of(uid).encode()))


def write_films(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / name)


ALL_FILMS = [film.split()[0] for study in STUDIES.values() for film in study[-1]]


@pytest.fixture
def made_up(tmp_path):
    folder = tmp_path / "data" / "iu_xray"
    write_csv(folder)
    write_films(folder / "images_normalized", [f"{name}.dcm.png" for name in ALL_FILMS if not name.startswith("6")])
    (folder / "r2gen_split_uids.json").write_text(json.dumps({"train": [1, 2, 6], "val": [4], "test": [5]}))
    return tmp_path / "data"


def uids(studies):
    return [row["uid"] for row in studies.rows]


# -------------------------------------------------------------------------------------------------------- made-up files


def test_rows(made_up):
    studies = load_iu_xray(made_up)
    assert uids(studies) == [1, 2, 5] and studies.counts() == {"train": 2, "test": 1}
    assert studies.left_out == {
        "not in the R2Gen split": 1,
        "no findings": 0,
        "no frontal film on disk": 2,
    }  # 3; 4 has a lateral only, 6 no file
    row = studies.rows[1]
    assert (row["patient"], row["split"], row["section"], row["report"]) == (
        "2",
        "train",
        "findings",
        "Heart is large.",
    )
    assert (row["mesh"], row["problems"], row["normal"]) == (
        ["Cardiomegaly/mild", "Opacity/lung"],
        ["Cardiomegaly", "Opacity"],
        False,
    )
    assert row["indication"] == ""  # "#NAME?" in the file
    assert row["image_path"].name == "2_IM-0652-1001.dcm.png" and row["lateral_path"].name == "2_IM-0652-2001.dcm.png"
    assert [image["projection"] for image in row["images"]] == ["Frontal", "Lateral"]
    assert studies.rows[2]["image_path"].name == "5_IM-2117-1001.dcm.png" and studies.rows[2]["lateral_path"] is None
    assert studies.rows[0]["normal"] and read_image(studies.rows[0]["image_path"]).shape == (32, 32)
    assert not studies.official and "no frontal film on disk" in str(studies)
    json.dumps(studies.facts())


def test_sections_and_views(made_up):
    def load(**settings):
        return uids(load_iu_xray(made_up, split=None, **settings))

    assert load(section="findings") == [1, 2, 5]
    assert load(section="impression") == [1, 2, 3, 5]
    assert load(section="findings+impression", views=()) == [1, 2, 5, 6]
    assert load(section="findings", views=()) == [1, 2, 4, 5, 6]
    assert load(section="findings", views=("lateral",)) == [1, 2, 4]
    assert load(section="findings", views=("frontal", "lateral")) == [1, 2]
    assert load(section="findings", allow_missing_images=True) == [1, 2, 4, 5, 6]
    assert (
        load_iu_xray(made_up, split=None, section="findings+impression").rows[1]["report"]
        == "Heart is large. Cardiomegaly."
    )


@pytest.mark.parametrize("archive", [True, False])
def test_xml_gives_the_same_rows(made_up, tmp_path, archive):
    write_xml(tmp_path / "xml", archive)
    (tmp_path / "xml" / "indiana_projections.csv").write_bytes(
        (made_up / "iu_xray" / "indiana_projections.csv").read_bytes()
    )
    write_films(
        tmp_path / "xml" / "NLMCXR_png", ["CXR1_1_IM-0001-4001.png", *(f"CXR{name}.png" for name in ALL_FILMS[2:])]
    )
    xml = load_iu_xray(tmp_path / "xml", split=None)
    expected = load_iu_xray(made_up, split=None, views=("frontal",))
    assert uids(xml) == [1, 2, 5, 6]
    assert xml.rows[0]["image_path"].name == "CXR1_1_IM-0001-4001.png" and xml.rows[0]["lateral_path"] is None
    for row, other in zip(xml.rows[:3], expected.rows, strict=True):
        assert {k: row[k] for k in ("uid", "findings", "impression", "mesh", "problems", "report")} == {
            k: other[k] for k in ("uid", "findings", "impression", "mesh", "problems", "report")
        }
    assert xml.rows[0]["indication"] == "Cough & fever" and xml.rows[1]["indication"] == "+PPD"  # what the CSV lost


def test_xml_alone_does_not_say_which_film_is_frontal(tmp_path):
    write_xml(tmp_path)
    write_films(tmp_path / "NLMCXR_png", [f"CXR{name}.png" for name in ALL_FILMS])
    with pytest.raises(InputError, match="indiana_projections.csv does"):
        load_iu_xray(tmp_path, split=None)
    studies = load_iu_xray(tmp_path, split=None, views=())
    assert (
        len(studies.rows) == 5
        and studies.rows[0]["image_path"] is None
        and all(image["path"] for image in studies.rows[0]["images"])
    )


def test_one_image_folder_is_used_the_fullest(made_up):
    folder = made_up / "iu_xray"
    names = [film.split()[0] for study in STUDIES.values() for film in study[-1] if "Frontal" in film]
    write_films(folder / "frontal_256", [f"{name}.dcm.jpg" for name in names])
    assert load_iu_xray(made_up, split=None).notes == {"films": "images_normalized: 7 of 8"}
    small = load_iu_xray(made_up, split=None, image_folder="frontal_256")
    assert uids(small) == [1, 2, 5, 6] and small.rows[3]["image_path"].name == "6_IM-2192-1001.dcm.jpg"
    for path in list((folder / "images_normalized").iterdir())[:4]:
        path.unlink()
    assert load_iu_xray(made_up, split=None).notes == {"films": "frontal_256: 5 of 8"}
    with pytest.raises(InputError, match="there is no image folder"):
        load_iu_xray(made_up, image_folder="frontal_512")


def test_names_of_films():
    names = ["1_IM-0001-3001.dcm.png", "1_IM-0001-3001.dcm.jpg", "CXR1_1_IM-0001-3001.png", "CXR1_1_IM-0001-3001"]
    assert {plain_name(name) for name in names} == {"1_IM-0001-3001"}
    assert (
        plain_name("CXR1024_IM-0019-1001-0002.png")
        == plain_name("1024_IM-0019-1001-0002.dcm.png")
        == "1024_IM-0019-1001-0002"
    )


def test_patient_split(made_up):
    settings = dict(section="impression", split="patient", views=(), shares={"train": 0.5, "test": 0.5})
    a, b, c = (load_iu_xray(made_up, **settings, seed=seed) for seed in (0, 0, 3))
    split = {row["uid"]: row["split"] for row in a.rows}
    assert split == {row["uid"]: row["split"] for row in b.rows} != {row["uid"]: row["split"] for row in c.rows}
    assert split == {1: "test", 2: "train", 3: "train", 5: "test", 6: "test"}  # on every machine
    other = load_iu_xray(made_up, **{**settings, "section": "findings"})
    assert all(split.get(row["uid"], row["split"]) == row["split"] for row in other.rows)  # whatever else is left out
    assert "seed 3" in c.version


def test_r2gen_split_from_annotation(made_up):
    folder = made_up / "iu_xray"
    (folder / "r2gen_split_uids.json").unlink()
    with pytest.raises(InputError, match="needs annotation.json"):
        load_iu_xray(made_up)
    (folder / "annotation.json").write_text(
        json.dumps(
            {
                "train": [{"id": "CXR2_IM-0652"}],
                "val": [{"id": "CXR5_IM-2117-1001"}],
                "test": [{"id": "CXR1_1_IM-0001"}],
            }
        )
    )
    assert {row["uid"]: row["split"] for row in load_iu_xray(made_up).rows} == {1: "test", 2: "train", 5: "val"}
    (folder / "annotation.json").write_text('{"train": [{"id": "2"}], "val": [], "test": []}')
    with pytest.raises(InputError, match="is not R2Gen's file"):
        load_iu_xray(made_up)
    for bad in ("[1, 2]", '{"train": 5, "val": [], "test": []}', '{"train": [[1]], "val": [], "test": []}'):
        (folder / "r2gen_split_uids.json").write_text(bad)
        with pytest.raises(InputError, match="r2gen_split_uids.json"):
            load_iu_xray(made_up)
    (folder / "r2gen_split_uids.json").write_text('{"train": [1, 2], "val": [2], "test": [5]}')
    with pytest.raises(InputError, match="a study in two splits"):
        load_iu_xray(made_up)


def test_refusals(made_up, tmp_path):
    folder = made_up / "iu_xray"
    with pytest.raises(DataNotFound, match="openi.nlm.nih.gov.*put the files into that folder"):
        load_iu_xray(tmp_path / "nowhere")
    with pytest.raises(InputError, match="there is no section 'all'"):
        load_iu_xray(made_up, section="all")
    with pytest.raises(InputError, match="there is no split 'random'"):
        load_iu_xray(made_up, split="random")
    with pytest.raises(InputError, match="neither NLMCXR_reports.tgz nor ecgen-radiology"):
        load_iu_xray(made_up, reports="xml")
    for path in (folder / "images_normalized").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="no study of .* is left .*put the films into .*images_normalized"):
        load_iu_xray(made_up)
    good = (folder / "indiana_reports.csv").read_text()
    for text, message in [
        (good.replace("findings", "finding"), "lacks the column findings"),
        (good.replace("\n2,", "\ntwo,"), "has the uid 'two'"),
        (good.replace("\n2,", "\n1,"), "more than one report of uid 1"),
    ]:
        (folder / "indiana_reports.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            load_iu_xray(made_up)
    (folder / "indiana_reports.csv").write_bytes(b"uid,MeSH\xff\n")
    with pytest.raises(InputError, match="cannot be read as a CSV file"):
        load_iu_xray(made_up)
    (folder / "indiana_projections.csv").unlink()
    with pytest.raises(InputError, match="indiana_projections.csv is missing"):
        load_iu_xray(made_up)
    (folder / "NLMCXR_reports.tgz").write_bytes(b"<html>")
    with pytest.raises(InputError, match="cannot be read; delete it"):
        load_iu_xray(made_up, reports="xml")
    (folder / "NLMCXR_reports.tgz").unlink()
    write_xml(folder, archive=False)
    for text in ("<eCitation/>", '<?xml version="1.0" encoding="martian"?><eCitation/>', "<eCitation>", ""):
        (folder / "ecgen-radiology" / "9.xml").write_text(text)
        with pytest.raises(InputError, match="is not a report of the Open-i collection"):
            load_iu_xray(made_up, reports="xml")


def test_gold_labels(made_up):
    folder = made_up / "iu_xray" / "labels"
    folder.mkdir()
    (folder / "openi_gld_std14.csv").write_text("filename,Atelectasis,normal\nCXR2,1,0\nCXR10,0,1\n")
    assert load_gold_labels(made_up) == {2: {"Atelectasis": 1, "normal": 0}, 10: {"Atelectasis": 0, "normal": 1}}
    (folder / "openi_gld_std14.csv").write_text("filename,Atelectasis,normal\nCXR2,1,\n")
    with pytest.raises(InputError, match="must be 0 or 1"):
        load_gold_labels(made_up)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("The lungs are clear. No effusion.", "the lungs are clear . no effusion ."),
        ("1. Clear lungs. 2. No effusion.", "clear lungs . no effusion ."),
        (
            "Heart size 1.5 cm (normal), no x-ray change....",
            "heart size 15 cm normal no x-ray change .",
        ),  # the hyphen stays
        (
            'Old fracture of T11. "XXXX" at 3:00; 50% [approx].',
            "old fracture of t1xxxx at 300 50 approx .",
        ),  # "1. " anywhere
        ("Clear. . Normal.", "clear .  . normal ."),  # an empty sentence leaves two spaces
        ("", " ."),
    ],
)
def test_clean_r2gen(text, cleaned):
    assert clean_r2gen(text) == cleaned


def test_groups_stay_together():
    groups = [f"p{i}" for i in range(1000)]
    split = split_groups(groups * 3, {"train": 0.7, "val": 0.1, "test": 0.2}, seed=5)
    assert Counter(split.values()) == {"train": 700, "val": 100, "test": 200} and split == split_groups(
        reversed(groups), {"train": 0.7, "val": 0.1, "test": 0.2}, seed=5
    )
    assert split != split_groups(groups, {"train": 0.7, "val": 0.1, "test": 0.2}, seed=6)
    for shares in ({}, {"train": 0.7, "test": 0.2}, {"train": 1.2, "test": -0.2}, {"train": 1.0, "test": 0.0}):
        with pytest.raises(InputError, match="add up to 1"):
            split_groups(groups, shares)
    with pytest.raises(InputError, match="2 groups are too few"):
        split_groups(["a", "b"], {"train": 0.8, "val": 0.1, "test": 0.1})


# --------------------------------------------------------------------------------------------------------------- images


def film(seed, size=256):
    """Smooth, as images are: noise at 16 x 16 pixels, enlarged; float32 in 0..1."""
    noise = np.random.default_rng(seed).integers(40, 200, (16, 16), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.BICUBIC), dtype=np.float32) / 255


def bits(a, b):
    return int((image_hash(a) != image_hash(b)).sum())


def test_copies_have_near_hashes_and_others_do_not():
    original = film(0)
    small = np.asarray(Image.fromarray(original).resize((100, 100), Image.BICUBIC))
    assert image_hash(original).shape == (255,) and bits(original, original) == 0
    assert (
        bits(original, small) <= 8
        and bits(original, original * 0.7) <= 4
        and bits(original, original**0.7) <= audits.SAME_IMAGE
    )
    assert bits(original, np.stack([original] * 3, axis=-1)) <= 2
    distances = [bits(film(i), film(j)) for i in range(8) for j in range(i)]
    assert min(distances) > 80  # two random hashes differ in 127 of 255 bits


def test_similar_images(tmp_path):
    for name, pixels in {
        "a.png": film(1),
        "a_small.jpg": film(1, 120),
        "b.png": film(2),
        "b_again.png": film(2),
        "c.png": film(3),
    }.items():
        Image.fromarray((pixels * 255).astype(np.uint8)).save(tmp_path / name, quality=60)
    (tmp_path / "bad.png").write_bytes(b"no image")
    found = similar_images({path.name: path for path in sorted(tmp_path.iterdir())})
    assert found["images"] == 5 and list(found["unreadable"]) == ["bad.png"]
    assert found["identical"] == [["b.png", "b_again.png"]]
    assert found["similar"] == [["a.png", "a_small.jpg"], ["b.png", "b_again.png"]]
    assert found["pairs"][0] == ("b.png", "b_again.png", 0)
    assert similar_images({})["similar"] == []


def test_pairs_across_blocks_and_linked_groups():
    hashes = np.zeros((7, 10), bool)
    hashes[5, :2] = True
    hashes[6, :] = True
    assert near_pairs(hashes[[0, 5, 6]], 2, block=1) == near_pairs(hashes[[0, 5, 6]], 2) == [(0, 1, 2)]
    assert len(near_pairs(hashes, 0, block=2)) == 10  # five equal ones: 5 * 4 / 2
    assert linked_groups([("b", "a", 1), ("c", "d", 1), ("b", "c", 2), ("x", "y", 0), ("a", "d", 3)]) == [
        ["a", "b", "c", "d"],
        ["x", "y"],
    ]


def test_audits_of_reports(made_up):
    rows = load_iu_xray(made_up, split=None, views=()).rows
    for row, split in zip(rows, ("train", "train", "val", "test", "test"), strict=True):
        row["split"] = split
    assert repeats(rows, ("report",)) == {"rows": 5, "distinct": 4, "repeats": 1, "ids": [[1, 5]]}
    assert seen(rows[3:], rows[:2], ("report",)) == {"rows": 1, "of": 2, "ids": [5]}
    assert seen(rows[3:], rows[:2], ("report",), clean_r2gen)["rows"] == 0  # R2Gen's text keeps the two spaces
    rows[4]["patient"] = "1"
    assert shared_between_splits(rows, "patient")["train, test"] == {"a": 2, "b": 2, "shared": 1, "ids": ["1"]}


def test_texts_that_say_nothing_are_left_out(made_up):
    path = made_up / "iu_xray" / "indiana_reports.csv"
    good = path.read_text()
    for word in ("nan", "NaN", "None", "N/A", "-", ".", "XXXX", "null", " "):
        path.write_text(good.replace("Heart is large.", word))
        studies = load_iu_xray(made_up)
        assert uids(studies) == [1, 5] and studies.left_out["no findings"] == 1, word
    path.write_text(good.replace("Cardiomegaly.", "NaN").replace("+PPD", "None"))
    assert uids(load_iu_xray(made_up, split=None, section="findings+impression")) == [1, 5]


def test_files_that_went_through_a_spreadsheet(made_up):
    """uids as 7.0, " 7" or "CXR7", projections in any case, names with folders, a byte order mark."""
    folder = made_up / "iu_xray"
    expected = load_iu_xray(made_up).rows
    reports, films = ((folder / name).read_text() for name in ("indiana_reports.csv", "indiana_projections.csv"))
    for change in (r"\n\1.0,", r"\n \1,", r"\nCXR\1,", r"\n\1 ,"):
        (folder / "indiana_projections.csv").write_text(re.sub(r"\n(\d),", change, films))
        assert load_iu_xray(made_up).rows == expected
        (folder / "indiana_projections.csv").write_text(films)
        (folder / "indiana_reports.csv").write_text(re.sub(r"\n(\d),", change, reports))
        assert load_iu_xray(made_up).rows == expected
        (folder / "indiana_reports.csv").write_text(reports)
    for change in (str.lower, str.upper, lambda text: text + " "):
        changed = re.sub("Frontal|Lateral", lambda match, change=change: change(match[0]), films)
        (folder / "indiana_projections.csv").write_text(changed)
        assert load_iu_xray(made_up).rows == expected
    changed = re.sub(r",(\d_IM)", r",D:\\films\\\1", films).replace(".png", ".PNG")
    (folder / "indiana_projections.csv").write_text(changed, encoding="utf-8-sig")
    (folder / "indiana_reports.csv").write_text(reports, encoding="utf-8-sig")
    split = (folder / "r2gen_split_uids.json").read_text()
    (folder / "r2gen_split_uids.json").write_text(split.replace("2", '"CXR2"'), encoding="utf-8-sig")
    assert [row["image_path"] for row in load_iu_xray(made_up).rows] == [row["image_path"] for row in expected]
    (folder / "indiana_projections.csv").write_text(re.sub(r"\n(\d),", r"\n9\1,", films))
    with pytest.raises(InputError, match="names no film of these reports as Frontal or Lateral"):
        load_iu_xray(made_up)


def test_audit_command(made_up, capsys, refused, tmp_path):
    (made_up / "iu_xray" / "r2gen_split_uids.json").write_text(json.dumps({"train": [1], "val": [2], "test": [5]}))
    arguments = ["--data-dir", str(made_up), "--hash-images", "--json", str(tmp_path / "audit.json")]
    audit_main(["audit", "iu_xray", *arguments])
    assert "cleaned test reports that occur in train / of: 1" in capsys.readouterr().out
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["films"]["images"] == 6 and found["patients in two splits"]["train, test"]["shared"] == 0
    assert "IU X-ray is not in" in refused(audit_main, ["audit", "iu_xray", "--data-dir", tmp_path / "none"])


def test_the_phantom_in_this_format(tmp_path):
    export = pytest.importorskip("phantom_files")
    export.export_iu_xray(tmp_path / "iu_xray", seed=1, count=9, size=64)
    rows = load_iu_xray(
        tmp_path,
        split="patient",
        section="findings+impression",
        reports="csv",
        shares={"train": 0.5, "val": 0.25, "test": 0.25},
    ).rows
    xml = load_iu_xray(tmp_path, split=None, section="findings+impression", reports="xml").rows
    assert [r["uid"] for r in rows] == [r["uid"] for r in xml] == list(range(1, 10))
    assert [r["report"] for r in rows] == [r["report"] for r in xml] and [r["mesh"] for r in rows] == [
        r["mesh"] for r in xml
    ]
    assert {read_image(row["image_path"]).shape for row in rows} == {(64, 64)} and rows[0]["lateral_path"] is not None


# ----------------------------------------------------------------------------------------------------------- real files


@pytest.fixture
def iu_dir(real_data):
    return real_data("iu_xray/indiana_reports.csv").parents[1]


@pytest.mark.realdata
def test_real_csv(iu_dir):
    studies = load_iu_xray(iu_dir, split=None, views=())
    every = load_iu_xray(iu_dir, section="impression", split=None, views=())
    both = load_iu_xray(iu_dir, section="findings+impression", split=None, views=())
    assert studies.official and len(studies.rows) == 3337 and len(both.rows) == 3331
    rows = read_reports(iu_dir / "iu_xray", "csv")[0]
    assert len(rows) == 3851 and len({row["patient"] for row in rows}) == 3851 and len(every.rows) == 3851 - 31
    assert sum(not row["findings"] and not row["impression"] for row in rows) == 25
    assert sum(row["normal"] for row in rows) == 1379
    assert sum(len(row["images"]) for row in rows) == 7466
    assert Counter(image["projection"] for row in rows for image in row["images"]) == {"Frontal": 3818, "Lateral": 3648}
    views = [{image["projection"] for image in row["images"]} for row in rows]
    assert sum("Frontal" in v for v in views) == 3689 and sum(len(v) == 2 for v in views) == 3388


@pytest.mark.realdata
def test_real_xml(iu_dir, real_data):
    real_data("iu_xray/NLMCXR_reports.tgz")
    rows, files = read_reports(iu_dir / "iu_xray", "xml")
    assert len(rows) == 3955
    findings, impression = ({row["uid"] for row in rows if row[name]} for name in ("findings", "impression"))
    assert (len(findings), len(impression), len(findings & impression), 3955 - len(findings | impression)) == (
        3425,
        3921,
        3419,
        28,
    )
    assert Counter(len(row["images"]) for row in rows) == {0: 104, 1: 446, 2: 3208, 3: 181, 4: 15, 5: 1}
    assert load_iu_xray(iu_dir, reports="xml").official
    in_csv = {row["uid"]: row for row in read_reports(iu_dir / "iu_xray", "csv")[0]}
    assert {row["uid"] for row in rows if row["images"]} == set(in_csv)  # the CSV is the reports with images
    texts = ("findings", "impression", "comparison", "mesh", "problems")
    assert all(row[name] == in_csv[row["uid"]][name] for row in rows if row["images"] for name in texts)
    lost = {row["uid"] for row in rows if row["images"] and row["indication"] != in_csv[row["uid"]]["indication"]}
    assert lost == {1555, 3477}  # "#NAME?"; that of 3784 was "-- XXXX", which says nothing either
    differ = {
        row["uid"]
        for row in rows
        if row["images"]
        and {plain_name(i["name"]) for i in row["images"]}
        != {plain_name(i["name"]) for i in in_csv[row["uid"]]["images"]}
    }
    assert differ == {2084, 2560, 3809}  # four films that the CSV does not list


@pytest.mark.realdata
def test_real_r2gen_split(iu_dir, real_data):
    annotation = json.loads(real_data("iu_xray/annotation.json").read_text())
    studies = load_iu_xray(iu_dir, allow_missing_images=True)
    assert (
        studies.counts() == {"train": 2069, "val": 296, "test": 590}
        and studies.left_out["not in the R2Gen split"] == 3851 - 2955
    )
    report_of = {row["uid"]: row["report"] for row in studies.rows}
    assert (
        sum(report_of[int(s["id"][3:].split("_")[0])] == s["report"] for part in annotation.values() for s in part)
        == 2955
    )
    assert {split: sum(row["normal"] for row in studies.split(split)) for split in ("train", "val", "test")} == {
        "train": 682,
        "val": 98,
        "test": 307,
    }
    assert all(len(row["images"]) >= 2 and row["findings"] for row in studies.rows)
    found = audit(iu_dir, allow_missing_images=True)
    assert (
        found["cleaned test reports that occur in train"]["rows"],
        found["cleaned val reports that occur in train"]["rows"],
    ) == (277, 66)
    assert found["cleaned test reports"]["distinct"] == 396 and found["cleaned test reports with xxxx"]["rows"] == 212
    assert all(pair["shared"] == 0 for pair in found["patients in two splits"].values())
    words = {
        split: [clean_r2gen(row["report"]).split() for row in studies.split(split)]
        for split in ("train", "val", "test")
    }
    assert {split: float(np.median([len(text) for text in texts])) for split, texts in words.items()} == {
        "train": 34,
        "val": 33,
        "test": 30,
    }
    assert sum(len(text) > 60 for text in words["test"]) == 27  # 4.6 %
    assert (
        sum(n >= 3 for n in Counter(word for text in words["train"] for word in text).values()) == 759
    )  # R2Gen's vocabulary


@pytest.mark.realdata
def test_real_films(iu_dir, real_data):
    real_data("iu_xray/frontal_256")
    studies = load_iu_xray(iu_dir, section="findings", split=None)
    assert studies.notes["films"].startswith("frontal_256: ")
    rows = read_reports(iu_dir / "iu_xray", "csv")[0]
    assert add_image_paths(rows, iu_dir / "iu_xray") == "frontal_256: 3794 of 7466"
    assert sum(row["image_path"] is not None for row in rows) == 3666 and not any(row["lateral_path"] for row in rows)
    subset = load_iu_xray(iu_dir, section="findings+impression", image_folder="images_normalized")
    assert (
        subset.counts() == {"train": 100, "val": 40, "test": 60}
        and sum(row["lateral_path"] is not None for row in subset.rows) == 50
    )
    assert read_image(subset.rows[0]["image_path"]).shape == (256, 256)


@pytest.mark.realdata
def test_real_gold_labels(iu_dir, real_data):
    real_data("iu_xray/labels/openi_gld_std14.csv")
    labels = load_gold_labels(iu_dir)
    assert len(labels) == 3851 and labels.keys() == {row["uid"] for row in read_reports(iu_dir / "iu_xray", "csv")[0]}
    positive = {name: sum(row[name] for row in labels.values()) for name in labels[1]}
    assert list(positive.values()) == [315, 345, 153, 60, 15, 106, 40, 22, 30, 42, 96, 19, 52, 0, 1379]
    assert positive["Edema"] == 42 and positive["normal"] == 1379


@pytest.mark.realdata
@pytest.mark.slow
def test_real_near_identical_films(real_data):
    folder = real_data("iu_xray/frontal_256")
    found = similar_images({path.stem.removesuffix(".dcm"): path for path in folder.iterdir()})
    assert found["images"] == 3794 and not found["unreadable"]
    assert sorted(sorted(group) for group in found["identical"]) == [
        ["1015_IM-0001-1001", "1015_IM-0013-1001"],
        ["3245_IM-1537-1001", "3245_IM-1537-4001"],
    ]
    # besides, one exposure with other letters on it, and two exposures of one patient; all within one study
    assert found["similar"] == [
        ["1015_IM-0001-1001", "1015_IM-0013-1001"],
        ["3245_IM-1537-1001", "3245_IM-1537-4001"],
        ["3549_IM-1739-1001-0001", "3549_IM-1739-1001-0002"],
        ["643_IM-2222-1001", "643_IM-2222-2001"],
    ]


@pytest.mark.realdata
def test_rexranks_layout(real_data):
    folder = real_data("iu_xray/annotation.json").parent
    row = load_iu_xray(folder, views=()).rows[0]
    written = {str(row["uid"]): {"findings": "a.", "impression": "b."}, "0": {"findings": "no such study"}}
    ((name, entry),) = rexrank_entries(written, folder).items()
    assert name.startswith(f"CXR{row['uid']}_") and entry["model_prediction"] == "Findings: a. Impression: b."
    assert entry["section_findings"] == row["findings"] and "section_impression" in entry
