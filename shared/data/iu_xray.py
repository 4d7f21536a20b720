"""
Indiana University chest X-rays with reports (Open-i; Demner-Fushman et al. 2016, doi:10.1093/jamia/ocv080): one row per
study.

    studies = load_iu_xray("data", section="findings", split="r2gen")
    for row in studies.split("train"):
        row["image_path"], row["report"]

A row is a dict:
    dataset, uid (int), patient (str: a uid is a patient), split (train, val, test or None)
    section, report            the section asked for, and its text
    findings, impression, indication, comparison                "" where the report has none; XXXX stands for removed
    words
    mesh, problems             index terms, such as "Cardiomegaly/mild", and their first parts; normal: the only term is
                               "normal"
    image_path, lateral_path   Path of the first frontal and the first lateral film that is there, or None
    images                     every film of the study: {"name", "projection" (Frontal, Lateral or None), "path" (or
                               None)}

Files, in <data-dir>/iu_xray or <data-dir> itself:
    indiana_reports.csv, indiana_projections.csv   3,851 reports with images, 7,466 images (Kaggle:
                                                   raddar/chest-xrays-indiana-university)
    NLMCXR_reports.tgz or ecgen-radiology/*.xml    all 3,955 reports; which film is frontal stands in
                                                   indiana_projections.csv only
    images_normalized/, images/images_normalized/, NLMCXR_png/, images/ or frontal_256/        one of them is used, the
    fullest
    annotation.json or r2gen_split_uids.json       the split of R2Gen (Chen et al. 2020)
    labels/openi_gld_std14.csv                     gold labels of NegBio, see load_gold_labels
Licence CC BY-NC-ND 4.0: images and texts may not be passed on changed. Split by uid: one patient each, 3,851 of them.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from shared.data import download as downloads
from shared.data.audit import RowSet, counted, id_of, repeats, seen, shared_between_splits, similar_across_splits
from shared.data.audit import split_groups
from shared.data.text import base_name, read_table, text_of
from shared.metrics.text import clean_r2gen
from shared.runtime import InputError, read_json

ADDRESS = "https://openi.nlm.nih.gov/imgs/collections/"  # not verified; its page is https://openi.nlm.nih.gov/faq
CSV_ADDRESS = "https://www.kaggle.com/datasets/raddar/chest-xrays-indiana-university"  # not verified; needs an account
REPORTS, FILMS, PROJECTIONS = "NLMCXR_reports.tgz", "NLMCXR_png.tgz", "indiana_projections.csv"
IMAGE_FOLDERS = ("images_normalized", "images/images_normalized", "NLMCXR_png", "images", "frontal_256")
SECTIONS = {"findings": ("findings",), "impression": ("impression",), "findings+impression": ("findings", "impression")}
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
# sha256 of the files for which the counts in tests/test_shared_iu_xray.py were made
KNOWN = {
    "indiana_reports.csv": "fd718e074451e93effedd868ca8995d2495e58e85878e08853f2dd35810f2149",
    "indiana_projections.csv": "7af9c8a6b4f8ae695c654ecd4208edd193a37892a5607b7cb9e609dc997e6b7a",
    REPORTS: "8fb6de7eec73d8c3665067ad4bb003ccd57f971ae316d2642e1627ac7268667a",
}


def load_iu_xray(
    data_dir,
    section="findings",
    split="r2gen",
    views=("frontal",),
    reports="auto",
    image_folder=None,
    shares=SHARES,
    seed=0,
    allow_missing_images=False,
):
    """
    -> RowSet of the studies that have the section(s) named and a film on disk for each of `views` ("frontal",
    "lateral"; () asks for none). `section`: findings, impression, findings+impression (both must be there, joined by a
    space). `split`: "r2gen" (studies outside it are left out), "patient" (by uid, with `shares` and `seed`), or None.
    `reports`: "csv", "xml", or "auto", the CSV files where they are. `allow_missing_images` keeps rows without a film,
    for work on texts. What is left out is counted. InputError when nothing is left, DataNotFound when there are no
    files.
    """
    if section not in SECTIONS:
        raise InputError(f"there is no section '{section}' of IU X-ray reports; there are {', '.join(SECTIONS)}")
    if split not in ("r2gen", "patient", None):
        raise InputError(f"there is no split '{split}' of IU X-ray; there are r2gen and patient")
    folder = find_iu_xray(data_dir)
    rows, read = read_reports(folder, reports)
    studies = RowSet("iu_xray", str(folder), rows)
    if split == "r2gen":
        split_of = r2gen_split(folder)
        studies.keep(lambda row: row["uid"] in split_of, "not in the R2Gen split")
    elif split == "patient":  # before anything is left out: the split of a patient does not depend on section or views
        split_of = split_groups([row["uid"] for row in rows], shares, seed)
    studies.keep(lambda row: all(row[name] for name in SECTIONS[section]), f"no {section.replace('+', ' or no ')}")
    for row in studies.rows:
        row["split"] = split_of[row["uid"]] if split else None
        row["section"], row["report"] = section, " ".join(row[name] for name in SECTIONS[section])
    studies.notes["films"] = add_image_paths(studies.rows, folder, image_folder)
    if views and not allow_missing_images:
        if not any(image["projection"] for row in studies.rows for image in row["images"]):
            if (folder / PROJECTIONS).is_file():
                raise InputError(
                    f"{folder / PROJECTIONS} names no film of these reports as Frontal or Lateral: check its columns"
                )
            raise InputError(
                f"nothing in {folder} says which film is frontal: {PROJECTIONS} does ({CSV_ADDRESS}); put it there, or"
                " ask for no views"
            )
        for view in views:
            key = {"frontal": "image_path", "lateral": "lateral_path"}[view]
            studies.keep(lambda row, key=key: row[key] is not None, f"no {view} film on disk")
    if not studies.rows:
        reasons = ", ".join(f"{n} {reason}" for reason, n in studies.left_out.items())
        raise InputError(
            f"no study of {folder} is left ({reasons}); put the films into {folder / IMAGE_FOLDERS[0]}, or allow"
            " missing images for work on texts"
        )
    with_seed = f" with seed {seed}" if split == "patient" else ""
    studies.version = f"section {section}, split {split or 'none'}{with_seed}, reports from {read[0].name}"
    studies.sha256 = {path.name: downloads.sha256_of(path) for path in read if path.is_file()}
    studies.official = studies.sha256 != {} and studies.sha256.items() <= KNOWN.items()
    return studies


def find_iu_xray(data_dir):
    return downloads.find_folder(
        data_dir,
        ("iu_xray",),
        ("indiana_reports.csv", REPORTS, "ecgen-radiology"),
        "IU X-ray",
        f"{ADDRESS}{REPORTS} (reports), {ADDRESS}{FILMS} (films) or {CSV_ADDRESS} (both)",
    )


# -------------------------------------------------------------------------------------------------------------- reports


def read_reports(folder, reports="auto"):
    """-> (rows without split and paths, ordered by uid as the CSV is; the files read)."""
    if reports not in ("auto", "csv", "xml"):
        raise InputError(f"IU X-ray reports are read from csv or xml, not from {reports}")
    path, projections = folder / "indiana_reports.csv", folder / PROJECTIONS
    if reports == "csv" or (reports == "auto" and path.exists()):
        return read_csv_reports(path, projections), [path, projections]
    path = next((folder / name for name in (REPORTS, "ecgen-radiology") if (folder / name).exists()), None)
    if path is None:
        raise downloads.DataNotFound(
            f"{folder} has neither {REPORTS} nor ecgen-radiology; fetch {ADDRESS}{REPORTS} and put it there"
        )
    rows = read_xml_reports(path)
    if not projections.is_file():
        return rows, [path]
    films = [film for films in read_projections(projections).values() for film in films]
    projection_of = {plain_name(name): projection for name, projection in films}
    for image in (image for row in rows for image in row["images"]):
        image["projection"] = projection_of.get(plain_name(image["name"]))
    return rows, [path, projections]


def make_row(uid, mesh, texts, images):
    """A row as far as the report file tells. texts: findings, impression, ...; images: [(name, projection)]."""
    row = {"dataset": "iu_xray", "uid": uid, "patient": str(uid), "split": None, "section": None, "report": None}
    row |= {name: text_of(texts.get(name)) for name in ("findings", "impression", "indication", "comparison")}
    mesh = [term.strip() for term in mesh]
    row |= {"mesh": mesh, "problems": [term.split("/")[0] for term in mesh], "normal": mesh == ["normal"]}
    row |= {"image_path": None, "lateral_path": None}
    return row | {"images": [{"name": name, "projection": p, "path": None} for name, p in images]}


def read_csv_reports(reports_path, projections_path):
    films = read_projections(projections_path)
    names = ("uid", "MeSH", "Problems", "indication", "comparison", "findings", "impression")
    rows = []
    for line in read_csv(reports_path, names):
        # "#NAME?" is what a spreadsheet made of three indications that begin with + or -
        texts = {name: "" if text == "#NAME?" else text for name, text in line.items()}
        mesh = [term for term in line["MeSH"].split(";") if text_of(term)]
        uid = uid_of(line["uid"], reports_path)
        rows.append(make_row(uid, mesh, texts, films.get(uid, [])))
    return no_repeated_uid(rows, reports_path)


def read_projections(path):
    """indiana_projections.csv -> {uid: [(name of a film, "Frontal" or "Lateral")]}."""
    films = {}
    for line in read_csv(path, ("uid", "filename", "projection")):
        name, projection = base_name(line["filename"]), line["projection"].strip().capitalize()
        films.setdefault(uid_of(line["uid"], path), []).append((name, projection))
    return films


def read_csv(path, columns):
    if not path.is_file():
        raise InputError(f"{path} is missing; it comes with {CSV_ADDRESS}")
    return [line for _, line in read_table(path, columns)]


def uid_of(value, path):
    """7, "7", " 7", "7.0" or "CXR7" -> 7."""
    match = re.fullmatch(r"(?:CXR)?(\d+)(?:\.0*)?", str(value).strip(), re.IGNORECASE)
    if match is None:
        raise InputError(f"{path} has the uid {value!r}; a uid is a whole number")
    return int(match[1])


def no_repeated_uid(rows, path):
    again = repeats(rows, ("uid",))["ids"]
    if again:
        raise InputError(f"{path} has more than one report of uid {again[0][0]}")
    return rows


def read_xml_reports(path):
    """
    The archive NLMCXR_reports.tgz (read as it is, not unpacked), or the folder ecgen-radiology -> rows without
    projections.
    """
    rows = []
    try:
        if path.is_dir():
            for file in path.glob("*.xml"):
                rows.append(parse_xml(file.read_bytes(), file))
        else:
            with tarfile.open(path) as archive:
                for info in archive:
                    if info.isreg() and info.name.endswith(".xml"):
                        rows.append(parse_xml(archive.extractfile(info).read(), f"{path}: {info.name}"))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} cannot be read; delete it and fetch {ADDRESS}{REPORTS} again ({error})") from error
    return no_repeated_uid(sorted(rows, key=lambda row: row["uid"]), path)


def parse_xml(data, path):
    try:
        root = ElementTree.fromstring(data)
        texts = {part.get("Label", "").lower(): "".join(part.itertext()) for part in root.iter("AbstractText")}
        mesh = [term.text for term in root.iterfind("MeSH/major") if term.text]  # <automatic>: words a program found
        images = [(image.get("id"), None) for image in root.iterfind("parentImage")]
        return make_row(uid_of(root.find("uId").get("id"), path), mesh, texts, images)
    except (ElementTree.ParseError, AttributeError, LookupError, ValueError) as error:  # the latter: of its encoding
        raise InputError(f"{path} is not a report of the Open-i collection ({error})") from error


# ---------------------------------------------------------------------------------------------------------------- films


def plain_name(name):
    """
    The name of a film without the habits of the folder it is in: "2_IM-0652-1001.dcm.png" (Kaggle),
    "CXR2_IM-0652-1001.png" (Open-i) and "CXR2_IM-0652-1001" (XML) are one film. Open-i repeats the uid in study 1:
    CXR1_1_IM-0001-3001.
    """
    name = re.sub(r"(\.dcm)?(\.(png|jpg|jpeg))?$", "", base_name(name), flags=re.IGNORECASE).removeprefix("CXR")
    return re.sub(r"^(\d+)_\1_", r"\1_", name)


def add_image_paths(rows, folder, image_folder=None):
    """Fill in the paths from the one image folder that has most of the films; returns "<folder>: n of N" for people."""
    if image_folder is not None and not (folder / image_folder).is_dir():
        raise InputError(f"there is no image folder {folder / image_folder}")
    films = [image for row in rows for image in row["images"]]
    wanted = {plain_name(image["name"]) for image in films}
    best, found = None, {}
    for name in [image_folder] if image_folder else IMAGE_FOLDERS:  # never two: they differ in size and in shape
        if (folder / name).is_dir():
            files = [path for path in sorted((folder / name).iterdir()) if not path.name.startswith(".")]
            here = {plain_name(path): path for path in files if path.suffix.lower() in (".png", ".jpg", ".jpeg")}
            here = {key: here[key] for key in here.keys() & wanted}
            if best is None or len(here) > len(found):
                best, found = name, here
    for image in films:
        image["path"] = found.get(plain_name(image["name"]))
    for row in rows:
        for key, projection in (("image_path", "Frontal"), ("lateral_path", "Lateral")):
            paths = [image["path"] for image in row["images"] if image["projection"] == projection and image["path"]]
            row[key] = paths[0] if paths else None
    return f"{best}: {len(found)} of {len(wanted)}" if best else "none"


# ---------------------------------------------------------------------------------------------------- split and labels


def r2gen_split(folder):
    """{uid: split} of R2Gen: 2,069 / 296 / 590 studies, those with two or more films and findings."""
    path = next((p for p in (folder / "r2gen_split_uids.json", folder / "annotation.json") if p.is_file()), None)
    if path is None:
        raise InputError(
            f"the R2Gen split needs annotation.json of R2Gen (https://github.com/zhjohnchan/R2Gen) in {folder}; or"
            " split by patient"
        )
    found, split_of, double = read_json(path), {}, []
    try:
        for split, studies in found.items():
            for study in studies:  # 2384, or {"id": "CXR2384_IM-0942", ...}: the number is the uid
                uid = study["id"].split("_")[0] if path.name == "annotation.json" else study
                if path.name == "annotation.json" and not uid.startswith("CXR"):
                    raise KeyError(uid)
                double += [uid] * (uid_of(uid, path) in split_of)
                split_of[uid_of(uid, path)] = split
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is not R2Gen's file: its studies must have an id such as CXR2384_IM-0942, or be uids"
        ) from error
    if set(found) != {"train", "val", "test"}:
        raise InputError(f"{path} must hold the splits train, val and test")
    if double:
        raise InputError(f"{path} has a study in two splits: {double[0]}")
    return split_of


def rexrank_entries(written, data_dir):
    """
    {uid as text: {"findings": text, "impression": text}, one or both} -> {study: entry} as ReXrank's evaluation reads
    them (ReXRank_IUXray_test.json: R2Gen's 590 test studies): the reference, and what was written as model_prediction.
    Studies are called as in annotation.json, where that is there.
    """
    folder = find_iu_xray(data_dir)
    path = folder / "annotation.json"
    names = [study["id"] for some in (read_json(path).values() if path.is_file() else ()) for study in some]
    names = {uid_of(name.split("_")[0], path): name for name in names}
    entries = {}
    for row in read_reports(folder)[0]:
        if parts := written.get(str(row["uid"])):
            said = [f"{name.capitalize()}: {parts[name]}" for name in ("findings", "impression") if parts.get(name)]
            entry = {f"section_{name}": row[name] for name in ("findings", "impression")} | {"split": "test"}
            entry |= {"context": f"Indication: {row['indication']}", "model_prediction": " ".join(said)}
            entries[names.get(row["uid"], f"CXR{row['uid']}")] = entry
    return entries


# label -> index terms, any of which makes it positive: a head, and qualifiers that must be there as well
MESH14 = {
    "No Finding": "normal",
    "Enlarged Cardiomediastinum": "Mediastinum/enlarged; Mediastinum/prominent",
    "Cardiomegaly": "Cardiomegaly; Cardiac Shadow/enlarged; Heart/enlarged",
    "Lung Opacity": "Opacity/lung; Density/lung; Infiltrate; Airspace Disease",
    "Lung Lesion": "Nodule; Mass; Cavitation; Opacity/lung/round; Density/lung/round",
    "Edema": "Pulmonary Edema",
    "Consolidation": "Consolidation",
    "Pneumonia": "Pneumonia",
    "Atelectasis": "Pulmonary Atelectasis",
    "Pneumothorax": "Pneumothorax; Hydropneumothorax; Hemopneumothorax",
    "Pleural Effusion": "Pleural Effusion; Hydropneumothorax; Hemopneumothorax; Hemothorax",
    "Pleural Other": "Thickening/pleura; Cicatrix/pleura; Pleura/abnormal",
    "Fracture": "Fractures, Bone",
    "Support Devices": "Catheters, Indwelling; Implanted Medical Device; Medical Device; Tube, Inserted; Stents;"
    " Surgical Instruments",
}


def item_matches(item, wanted):
    """ "Opacity/lung/base" has "Opacity" and "Opacity/lung", not "Opacity/base/round" and not "Opac"."""
    head, *qualifiers = (" ".join(part.lower().split()) for part in item.split("/"))
    wanted_head, *needed = (" ".join(part.lower().split()) for part in wanted.split("/"))
    return head == wanted_head and set(needed) <= set(qualifiers)


def mesh_labels(items, mapping=MESH14):
    """
    Index terms of one report -> {label: 1 or 0}, or all None where the report was not indexed. mapping: as MESH14.
    Terms are compared whole, never as substrings, and list what the indexers saw: what is not there is negative. Labels
    are not closed upwards (an oedema does not count as an opacity).
    """
    if not items or any(item_matches(item, "No Indexing") for item in items):
        return dict.fromkeys(mapping)
    return {
        label: int(any(item_matches(item, want) for item in items for want in wanted.split("; ")))
        for label, wanted in mapping.items()
    }


def load_gold_labels(data_dir):
    """
    -> {uid: {name: 0 or 1}} for all 3,851 reports, by the authors of NegBio (Peng et al. 2018): the 14 names of
    ChestX-ray14 and "normal", from how the reports were indexed. They are not the 14 CheXpert conditions, there is no
    "uncertain", and a finding that the text mentions may be missing.
    """
    path = find_iu_xray(data_dir) / "labels" / "openi_gld_std14.csv"
    labels = {}
    for line in read_csv(path, ("filename", "Atelectasis", "normal")):
        uid = uid_of(line.pop("filename"), path)
        if set(line.values()) - {"0", "1"}:
            raise InputError(f"{path}: the labels of CXR{uid} must be 0 or 1")
        labels[uid] = {name: int(value) for name, value in line.items()}
    return labels


# --------------------------------------------------------------------------------------------------- download and audit


def download(data_dir, images=False):
    """
    Fetch the reports (1 MB) and, with `images`, the films (about 14 GB) from Open-i; returns the folder. Addresses not
    verified.
    """
    folder = Path(data_dir) / "iu_xray"
    downloads.fetch(ADDRESS + REPORTS, folder / REPORTS, sha256=KNOWN[REPORTS])
    if images and not (folder / "NLMCXR_png").is_dir():
        archive = downloads.fetch(ADDRESS + FILMS, folder / FILMS)
        downloads.unpack(archive, folder / "NLMCXR_png")
        archive.unlink()
    if not (folder / PROJECTIONS).is_file():
        print(f"which film is frontal stands in {PROJECTIONS} only: get it from {CSV_ADDRESS} and put it into {folder}")
    return folder


def audit(data_dir, allow_missing_images=False, hash_images=False):
    """
    What the R2Gen split hides: cleaned test reports that occur in train, how few are distinct, patients or films in two
    splits.
    """
    studies = load_iu_xray(data_dir, allow_missing_images=allow_missing_images)
    train, val, test = (studies.split(name) for name in ("train", "val", "test"))
    found = {
        "data": studies.facts(),
        "patients in two splits": shared_between_splits(studies.rows, "patient"),
        "cleaned test reports that occur in train": seen(test, train, ("report",), clean_r2gen),
        "cleaned val reports that occur in train": seen(val, train, ("report",), clean_r2gen),
        "cleaned test reports": repeats(test, ("report",), clean_r2gen),
        "cleaned test reports with xxxx": counted([id_of(r) for r in test if "xxxx" in clean_r2gen(r["report"])]),
    }
    if hash_images:
        films = [(image["name"], row["split"], image["path"]) for row in studies.rows for image in row["images"]]
        paths = {name: path for name, _, path in films if path}
        found["films"] = similar_across_splits([film[:2] for film in films], paths)
    return found
