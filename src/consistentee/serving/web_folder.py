"""The playground without a server: a folder with graph, page, runtime and tokenizer that any file server shows.

Nothing of it is fetched from elsewhere: ONNX Runtime Web and the tokenizer are copied from npm packages, with their
licences.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from consistentee.atomic_files import user_path
from consistentee.errors import SettingError
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.models.loaded import LoadedClassifier, short_name
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.export import GRAPH_FILE, WEIGHTS_FILE, Exported, export_onnx, require_replaceable
from consistentee.serving.descriptions import describe_classifier
from consistentee.serving.playground import web_page
from consistentee.serving.points import ServedPoint, served_points

PACKAGES = {"onnxruntime-web": "1.30.0", "@huggingface/tokenizers": "0.2.0"}
"""npm packages by name, with the versions that the page was tested with."""

PACKAGE_FILES = {
    "onnxruntime-web.js": ("onnxruntime-web", "dist/ort.wasm.bundle.min.mjs"),
    "onnxruntime-web.wasm": ("onnxruntime-web", "dist/ort-wasm-simd-threaded.wasm"),
    "tokenizers.js": ("@huggingface/tokenizers", "dist/tokenizers.min.mjs"),
    "tokenizers.LICENSE.txt": ("@huggingface/tokenizers", "LICENSE"),
}
"""What is copied of them: the package, and its file. Servers that do not know `.mjs` know `.js`."""

NOTICES = {
    "onnxruntime-web.LICENSE.txt": "LICENSE",
    "onnxruntime-web.ThirdPartyNotices.txt": "ThirdPartyNotices.txt",
}
"""What is copied of ONNX Runtime's Python package: its npm package has no licence file."""

NPM_SECONDS = 600
_SPECS = [f"{name}@{version}" for name, version in PACKAGES.items()]
_REMEDY = f"Run `npm install {' '.join(_SPECS)}` in a folder and name it with --npm."


def export_web(
    saved: LoadedClassifier, folder: str | Path, *, npm: str | Path | None = None, **how: Any
) -> Exported:
    """Write a model as a page that runs it in a browser; the folder appears when it is complete.

    Args:
        saved: a model of this library, of a type that runs packed.
        folder: where it is to be; new, empty, or an export that is replaced.
        npm: a folder with `node_modules` that has `PACKAGES`, or that folder itself; None lets npm fetch them.
        **how: keywords of `export_onnx`.

    Raises:
        SettingError: as `export_onnx`; the packages are not there, or the weights are too many for a browser.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    require_replaceable(user_path(folder))
    with npm_packages(npm) as packages:

        def add_files(place: Path, config: Mapping[str, Any]) -> None:
            if (place / WEIGHTS_FILE).exists():
                raise SettingError(
                    "--format web needs a graph of less than 1.8 GB. Take --precision int8, or onnx."
                )
            for name, (package, path) in PACKAGE_FILES.items():
                shutil.copyfile(packages / package / path, place / name)
            for name, path in NOTICES.items():
                shutil.copyfile(_onnxruntime_folder() / path, place / name)
            size = (place / GRAPH_FILE).stat().st_size
            about = {**_description(saved, config), "graph": {"bytes": size}}
            (place / "playground.json").write_text(json.dumps(about), encoding="utf-8")
            (place / "index.html").write_text(web_page(size / 1e6), encoding="utf-8")

        return export_onnx(saved, folder, shows_layers=True, add_files=add_files, **how)


def _description(saved: LoadedClassifier, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `GET /layers` would say, with the graph's criterion alone, its own threshold first."""
    engine, criterion = Engine(saved), config["criterion"]
    points = served_points(engine)
    first = next(iter(points))
    if criterion is not None:
        rule = ExitRule(criterion, config["threshold"])
        same = [name for name, point in points.items() if point.rule == rule]
        first = same[0] if same else "exported"
        points = {first: points.get(first) or ServedPoint(first, rule), **points}
    name = short_name(saved.name)
    return describe_classifier(engine, points, name=name, first=first, criterion=criterion)


@contextmanager
def npm_packages(npm: str | Path | None) -> Iterator[Path]:
    """The `node_modules` folder that has `PACKAGES`.

    Args:
        npm: as of `export_web`.

    Raises:
        SettingError: they are not there, and npm cannot fetch them.
    """
    if npm is not None:
        given = user_path(npm)
        inside = given / "node_modules"
        yield _checked(inside if inside.is_dir() else given)
        return
    program = shutil.which("npm")
    if program is None:
        raise SettingError(f"--format web needs npm packages, and npm is not installed. {_REMEDY}")
    with TemporaryDirectory(prefix="consistentee-npm-") as place:
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
        command = [program, "install", *options, "--prefix", place, *_SPECS]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS, cwd=place)
        except subprocess.TimeoutExpired:
            raise SettingError(f"npm did not end within {NPM_SECONDS} s. {_REMEDY}") from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-300:]
            raise SettingError(
                f"npm could not fetch {' and '.join(_SPECS)} ({said or 'no word why'}). {_REMEDY}"
            )
        yield _checked(Path(place) / "node_modules")


def _checked(packages: Path) -> Path:
    """The folder, once it is sure that it has the packages and versions.

    Raises:
        SettingError: it has not.
    """
    for name, wanted in PACKAGES.items():
        try:
            found = json.loads((packages / name / "package.json").read_text(encoding="utf-8"))["version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise SettingError(
                f'--npm must be a folder with the npm package {name}, got "{packages}". {_REMEDY}'
            ) from None
        if found != wanted:
            raise SettingError(f"--npm must have {name} {wanted}, got {found}. {_REMEDY}")
    for package, path in PACKAGE_FILES.values():
        if not (packages / package / path).is_file():
            raise SettingError(f"--npm must have all of {package}, and {path} is missing. {_REMEDY}")
    return packages


def _onnxruntime_folder() -> Path:
    """Of the Python package, which was asked for before the graph was written."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise SettingError("onnxruntime must be installed, and is not.")
    return Path(found.origin).parent
