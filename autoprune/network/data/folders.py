"""Folders and archives of images.

Decides which files of a folder or tar archive are images of which part and class, how they are decoded, and how the
decoded images are kept so that they are decoded once. Must not know how parts are split or normalised.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from autoprune.errors import DataError
from autoprune.files import whole_file
from autoprune.network.data.samples import Source

PARTS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MEMORY_LIMIT = 4 * 2**30
"""Bytes of decoded images that are held in memory; larger sets are streamed from their folder."""
_SCHEMA = "1"
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class _File(NamedTuple):
    """An image file: its part, `<class>/<file>`, and what tells whether it changed (0 inside an archive)."""

    part: str
    name: str
    size: int = 0
    mtime: int = 0


def read_image_folder(path: Path, *, size: int | None, cache_dir: Path) -> Source:
    """Reads `train/<class>/*` and `test|val/<class>/*` from a folder or a `.tar`, `.tar.gz`, `.tar.xz` archive.

    Where `val` stands beside `test`, each keeps its name; a lone `val` is the test part. Images become RGB. What fits
    into `MEMORY_LIMIT` is decoded once and kept in `cache_dir`, keyed by path, sizes and modification times.

    Args:
        path: The folder or archive.
        size: Shorter side after resizing, and side of the centre crop; None: as the files are, all of one size.
        cache_dir: Folder for the decoded images; made where it is missing.

    Raises:
        DataError: The path is missing, is neither a folder nor an archive, holds no training images, has a class folder
            without images, an image cannot be read or has another size than the first, or an archive is too large.
    """
    if not path.exists():
        raise DataError(f"there is no image folder or archive at {path}")
    stamp = path.stat()
    files = [] if path.is_file() else _name_parts(list(_list_folder(path)), path)
    facts = [_SCHEMA, str(path.resolve()), size, [stamp.st_size, stamp.st_mtime_ns] if path.is_file() else files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    cached = cache_dir / f"images-{key}.safetensors"
    if cached.exists():
        with safe_open(cached, framework="pt") as opened:
            files = [_File(*entry) for entry in json.loads(opened.metadata()["files"])]
            return _source(opened.get_tensor("images"), files)
    images: Pixels | None
    if path.is_file():
        files = _name_parts(list(_list_archive(path)), path)
        images = _decode_archive(path, files, size=size)
    else:
        images = _decode_folder(path, files, size=size)
    if images is None:
        return _source(
            ImageFiles(_paths(path, files), _source(torch.empty(0), files).targets.tolist(), size=size), files
        )
    samples = torch.from_numpy(images)
    metadata = {"schema": _SCHEMA, "source": str(path), "files": json.dumps(files)}
    try:
        with whole_file(cached) as temporary:
            save_file({"images": samples}, temporary, metadata=metadata)
    except SafetensorError as error:  # a full disk, for which it has no kind of its own
        raise DataError(f"the decoded images cannot be kept in {cache_dir}: {error}") from error
    return _source(samples, files)


def _source(samples: Tensor | Dataset[Any], files: Sequence[_File]) -> Source:
    labels = [file.name.split("/")[0] for file in files]
    classes = sorted(set(labels))
    position = {name: number for number, name in enumerate(classes)}
    parts = {
        part: torch.tensor([i for i, file in enumerate(files) if file.part == part], dtype=torch.int64)
        for part in dict.fromkeys(file.part for file in files)
    }
    return Source(
        samples=samples,
        targets=torch.tensor([position[label] for label in labels], dtype=torch.int64),
        parts=parts,
        classes=tuple(classes),
        names=tuple(file.name for file in files),
    )


def _list_folder(root: Path) -> Iterator[_File]:
    for part in PARTS:
        if not (root / part).is_dir():
            continue
        for folder in sorted(entry for entry in (root / part).iterdir() if entry.is_dir()):
            found = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"class {folder.name!r} has no image in {folder}")
            for file in found:
                stat = file.stat()
                yield _File(part, f"{folder.name}/{file.name}", stat.st_size, stat.st_mtime_ns)


def _list_archive(path: Path) -> Iterator[_File]:
    """Lists the images of an archive; folders that lead to `train` and `test` are ignored."""
    empty: dict[str, bool] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                place = _place(member)
                if place is None:
                    continue
                part, name = place
                if member.isdir():
                    empty.setdefault(f"{part}/{name}", True)
                    continue
                empty[f"{part}/{name.split('/')[0]}"] = False
                yield _File(part, name)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        reason = str(error).splitlines()[0].removesuffix(":") if str(error) else type(error).__name__
        raise DataError(f"{path} is not a tar archive that can be read: {reason}") from error
    for folder, is_empty in empty.items():
        if is_empty:
            raise DataError(f"class {folder.split('/')[1]!r} has no image in {folder} of {path}")


def _place(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Returns (part, `<class>/<file>`) of an image and (part, class) of a class folder; None for anything else."""
    steps = PurePosixPath(member.name).parts
    if member.isdir():
        return (steps[-2], steps[-1]) if len(steps) >= 2 and steps[-2] in PARTS else None
    if not member.isfile() or len(steps) < 3 or steps[-3] not in PARTS:
        return None
    if PurePosixPath(steps[-1]).suffix.lower() not in SUFFIXES:
        return None
    return steps[-3], f"{steps[-2]}/{steps[-1]}"


def _name_parts(files: list[_File], path: Path) -> list[_File]:
    """Checks that there are training images, and calls a `val` without a `test` the test part."""
    found = {file.part for file in files}
    if "train" not in found:
        raise DataError(f"{path} has no images under train/<class>/ (suffixes: {', '.join(SUFFIXES)})")
    if "val" in found and "test" not in found:
        return [f._replace(part="test") if f.part == "val" else f for f in files]
    return files


def _decode_archive(path: Path, files: Sequence[_File], *, size: int | None) -> Pixels:
    images: Pixels | None = None
    position = 0
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isfile() or _place(member) is None:
                continue
            stream = archive.extractfile(member)
            assert stream is not None  # it is a file
            image = _decode(stream, f"{member.name} in {path}", size=size)
            if images is None:
                total = image.nbytes * len(files)
                if total > MEMORY_LIMIT:
                    raise DataError(
                        f"{path} holds {total / 2**30:.1f} GiB of decoded images, too many to keep in memory: "
                        "unpack it and give the folder"
                    )
                images = np.empty((len(files), *image.shape), dtype=np.uint8)
            _store(images, position, image, f"{member.name} in {path}")
            position += 1
    assert images is not None  # the list of files is not empty
    return images


def _decode_folder(path: Path, files: Sequence[_File], *, size: int | None) -> Pixels | None:
    """Returns the decoded images `(N, 3, H, W)`; None where they are too many to hold."""
    images: Pixels | None = None
    for position, file in enumerate(_paths(path, files)):
        with open(file, "rb") as stream:
            image = _decode(stream, str(file), size=size)
        if images is None:
            if image.nbytes * len(files) > MEMORY_LIMIT:
                return None
            images = np.empty((len(files), *image.shape), dtype=np.uint8)
        _store(images, position, image, str(file))
    return images


def _paths(root: Path, files: Sequence[_File]) -> list[Path]:
    lone_val = not (root / "test").is_dir()
    return [root / ("val" if file.part == "test" and lone_val else file.part) / file.name for file in files]


def _store(images: Pixels, position: int, image: Pixels, label: str) -> None:
    if image.shape != images.shape[1:]:
        height, width = image.shape[1:]
        raise DataError(
            f"{label} is {width}x{height} pixels, the first image {images.shape[3]}x{images.shape[2]}: "
            "set preprocessing.size to bring them to one size"
        )
    images[position] = image


def _decode(stream: IO[bytes], label: str, *, size: int | None) -> Pixels:
    """Returns an image as uint8 `(3, H, W)`, its shorter side resized to `size` and the centre cut out."""
    try:
        with Image.open(stream) as opened:
            image = opened.convert("RGB")
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the image {label} cannot be read: {error}") from error
    if size is not None:
        ratio = size / min(image.size)
        width, height = (max(size, round(side * ratio)) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files that are decoded when they are asked for: uint8 `(3, H, W)` and the class."""

    def __init__(self, paths: Sequence[Path], targets: Sequence[int], *, size: int | None) -> None:
        self.paths = list(paths)
        self.targets = list(targets)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        path = self.paths[position]
        with open(path, "rb") as stream:
            image = _decode(stream, str(path), size=self.size)
        return torch.from_numpy(np.ascontiguousarray(image)), self.targets[position]
