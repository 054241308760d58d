"""Image data sets for the benchmarks, read with gzip, struct and numpy alone.

``load(name, data_dir)`` returns a :class:`Dataset`. ``digits`` ships with scikit-learn; the
others are the standard files of their data sets, which this module never downloads:

=========== ======================================================== ==========================
name        files, in DIR or in a folder of it                       folder
=========== ======================================================== ==========================
mnist       train- and t10k-{images-idx3,labels-idx1}-ubyte[.gz]     mnist
fashion     the same four names                                      fashion
cifar10     data_batch_1.bin to data_batch_5.bin, test_batch.bin     cifar-10-batches-bin
=========== ======================================================== ==========================

Whatever is wrong with a file becomes one :class:`DataError`, whose message is one line: which
file, what was expected, what was found.
"""

import gzip
import os.path
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

CLASSES = 10
IDX_IMAGES = 0x0803  # unsigned bytes, three dimensions
IDX_LABELS = 0x0801  # unsigned bytes, one dimension
IDX_SHAPE = (28, 28)
IDX_SETS = ("mnist", "fashion")  # also the names of their folders
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = "test_batch.bin"
CIFAR_RECORDS = 10_000  # in each of the six files
CIFAR_SHAPE = (3, 32, 32)  # three planes, red, green, blue, after the one label byte
DIGITS_TRAIN = 1500  # of 1797; the order of the data set is kept, so the test writers are new
DATASETS = ("digits", *IDX_SETS, "cifar10")


class DataError(ValueError):
    """A data file that is missing or is not what it should be, told in one line."""


class Dataset(NamedTuple):
    """Images are float32 in [0, 1], (N, height, width, channels); labels are int32, (N,)."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Reads one of ``DATASETS``; ``digits`` needs no ``data_dir``."""
    if name == "digits":
        return _load_digits()
    if name not in DATASETS:
        _fail("data set", f"one of {', '.join(DATASETS)}", repr(name))
    if data_dir is None:
        _fail(name, "a data directory (--data-dir DIR) that holds its files", "none")
    directory = Path(data_dir)
    if not os.path.isdir(directory):  # noqa: PTH112
        _fail(directory, "a directory", "a file" if _exists(directory) else "nothing there")
    return _load_cifar10(directory) if name == "cifar10" else _load_idx(name, directory)


def load_or_exit(name: str, data_dir: str | Path | None = None) -> Dataset:
    """``load`` for scripts: a DataError becomes its line on stderr and exit code 2."""
    try:
        return load(name, data_dir)
    except DataError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def read_idx_images(path: Path) -> np.ndarray:
    """The uint8 images (N, 28, 28) of one IDX file."""
    data = _read_bytes(path)
    count, *shape = _idx_header(path, data, IDX_IMAGES)
    if tuple(shape) != IDX_SHAPE:
        _fail(path, "images of 28 x 28 pixels", f"images of {shape[0]} x {shape[1]}")
    pixels = _idx_body(path, data, 16, count, count * IDX_SHAPE[0] * IDX_SHAPE[1])
    return pixels.reshape(count, *IDX_SHAPE)


def read_idx_labels(path: Path) -> np.ndarray:
    """The uint8 labels (N,) of one IDX file."""
    data = _read_bytes(path)
    (count,) = _idx_header(path, data, IDX_LABELS)
    return _checked_labels(path, _idx_body(path, data, 8, count, count))


def read_cifar10_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The uint8 images (N, 32, 32, 3) and labels (N,) of one CIFAR-10 binary batch."""
    record = 1 + int(np.prod(CIFAR_SHAPE))
    expected, data = CIFAR_RECORDS * record, _read_bytes(path)
    if len(data) != expected:
        _fail(path, f"{expected} bytes ({CIFAR_RECORDS} records of {record})", f"{len(data)} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    planes = records[:, 1:].reshape(-1, *CIFAR_SHAPE)
    return planes.transpose(0, 2, 3, 1), _checked_labels(path, records[:, 0])


def _load_digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        _fail("digits", "scikit-learn, which ships this data set", "it is not installed")
    bunch = load_digits()
    images = (bunch.images[..., None] / 16.0).astype(np.float32)  # pixels count from 0 to 16
    labels = bunch.target.astype(np.int32)
    n = DIGITS_TRAIN
    return Dataset("digits", images[:n], labels[:n], images[n:], labels[n:])


def _load_idx(name: str, data_dir: Path) -> Dataset:
    stems = {split: f"{split}-%s-ubyte" for split in ("train", "t10k")}
    names = [stem % part for stem in stems.values() for part in ("images-idx3", "labels-idx1")]
    either = [name for stem in names for name in (stem, stem + ".gz")]
    directory = _directory(data_dir, name, either)

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        image_path = _find(directory, stems[split] % "images-idx3")
        label_path = _find(directory, stems[split] % "labels-idx1")
        images, labels = read_idx_images(image_path), read_idx_labels(label_path)
        if len(images) != len(labels):
            found = f"{len(labels)} labels"
            _fail(label_path, f"{len(images)} labels, one for each of {image_path.name}", found)
        return _unit(images[..., None]), labels.astype(np.int32)

    return Dataset(name, *read("train"), *read("t10k"))


def _load_cifar10(data_dir: Path) -> Dataset:
    directory = _directory(data_dir, CIFAR_FOLDER, [*CIFAR_TRAIN, CIFAR_TEST])
    batches = [read_cifar10_batch(_existing(directory / name)) for name in CIFAR_TRAIN]
    test_images, test_labels = read_cifar10_batch(_existing(directory / CIFAR_TEST))
    train_images, train_labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    train = _unit(train_images), train_labels.astype(np.int32)
    return Dataset("cifar10", *train, _unit(test_images), test_labels.astype(np.int32))


def _directory(data_dir: Path, folder: str, names: list[str]) -> Path:
    """The folder of ``data_dir`` that bears the set's name if any of its files lie there.

    One place for the whole set: two sets share their file names, and must never be mixed.
    """
    inner = data_dir / folder
    return inner if any(_exists(inner / name) for name in names) else data_dir


def _find(directory: Path, stem: str) -> Path:
    plain, zipped = directory / stem, directory / f"{stem}.gz"
    return zipped if _exists(zipped) and not _exists(plain) else _existing(plain, " (or .gz)")


def _existing(path: Path, also: str = "") -> Path:
    if not _exists(path):
        _fail(path, f"this file{also}", "no such file")
    return path


def _exists(path: Path) -> bool:
    # Not path.exists(): that raises where a folder may not be searched.
    return os.path.exists(path)  # noqa: PTH110


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        _fail(path, f"a complete gzip file, {len(data)} bytes long", f"damage ({error})")
    except OSError as error:  # a directory of that name, no permission, a failing disk
        _fail(path, "a readable file", error.strerror or str(error))


def _idx_header(path: Path, data: bytes, magic: int) -> tuple[int, ...]:
    dimensions = magic & 0xFF
    size = 4 + 4 * dimensions
    if len(data) < size:
        _fail(path, f"at least the {size} bytes of an IDX header", f"{len(data)} bytes")
    found, *shape = struct.unpack(f">{1 + dimensions}I", data[:size])
    if found != magic:
        hint = {IDX_IMAGES: " (images)", IDX_LABELS: " (labels)"}.get(found, "")
        hint = " (gzip: name it .gz)" if found >> 16 == 0x1F8B else hint
        kind = "images" if magic == IDX_IMAGES else "labels"
        _fail(path, f"magic number 0x{magic:08x} (IDX {kind})", f"0x{found:08x}{hint}")
    return tuple(shape)


def _idx_body(path: Path, data: bytes, offset: int, count: int, size: int) -> np.ndarray:
    if count == 0:
        _fail(path, "at least one example", "a header that announces none")
    if len(data) - offset != size:
        found = f"{len(data)} bytes"
        _fail(path, f"{offset + size} bytes, as its header says ({count} examples)", found)
    return np.frombuffer(data, np.uint8, offset=offset)


def _checked_labels(path: Path, labels: np.ndarray) -> np.ndarray:
    wrong = np.flatnonzero(labels >= CLASSES)
    if wrong.size:
        first = f"label {labels[wrong[0]]} at example {wrong[0]} ({wrong.size} such)"
        _fail(path, f"labels from 0 to {CLASSES - 1}", first)
    return labels


def _unit(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels, np.float32) / np.float32(255)


def _fail(where: str | Path, expected: str, found: str) -> NoReturn:
    raise DataError(f"{where}: expected {expected}, found {found}") from None
