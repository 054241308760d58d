"""The benchmark readers: round trips, a table of faults, fuzz, and what the shell sees."""

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from lib import data
from races import race

pytestmark = pytest.mark.once
RECORDS = 3  # a tiny CIFAR-10 batch


def idx(array, magic=None):
    """The bytes of an IDX file; ``magic`` overrides the right one."""
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def pixels(count, *shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


def write_idx(folder, zipped=False):
    """A tiny MNIST; returns its arrays by file name."""
    arrays = {
        "train-images-idx3-ubyte": pixels(12, 28, 28),
        "train-labels-idx1-ubyte": np.arange(12, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": pixels(5, 28, 28),
        "t10k-labels-idx1-ubyte": np.arange(5, dtype=np.uint8),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        content = idx(array)
        (folder / (name + ".gz" * zipped)).write_bytes(
            gzip.compress(content, 1) if zipped else content
        )
    return arrays


def write_cifar(folder):
    """A tiny CIFAR-10; returns its records by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {}
    for seed, name in enumerate((*data.CIFAR_TRAIN, data.CIFAR_TEST)):
        rows = np.random.default_rng(seed).integers(0, 256, (RECORDS, 3073), np.uint8)
        rows[:, 0] = np.arange(RECORDS) + seed
        (folder / name).write_bytes(rows.tobytes())
        records[name] = rows
    return records


@pytest.fixture
def tiny_cifar(monkeypatch):
    monkeypatch.setattr(data, "CIFAR_RECORDS", RECORDS)


def assert_sane(dataset, train, test, shape):
    assert dataset.train_images.shape == (train, *shape)
    assert dataset.test_images.shape == (test, *shape)
    for images, labels in ((dataset[1], dataset[2]), (dataset[3], dataset[4])):
        assert images.dtype == np.float32 and labels.dtype == np.int32
        assert images.min() >= 0 and images.max() <= 1
        assert labels.shape == images.shape[:1]


def test_digits_need_no_files():
    digits = data.load("digits")
    assert_sane(digits, 1500, 297, (8, 8, 1))
    assert digits.train_images.max() == 1 and set(digits.train_labels) == set(range(10))


@pytest.mark.parametrize("name", ["mnist", "fashion"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_idx_round_trip(tmp_path, name, zipped, nested):
    arrays = write_idx(tmp_path / name if nested else tmp_path, zipped)
    dataset = data.load(name, str(tmp_path))
    assert dataset.name == name
    assert_sane(dataset, 12, 5, (28, 28, 1))
    expected = arrays["t10k-images-idx3-ubyte"]
    np.testing.assert_array_equal(np.rint(dataset.test_images[..., 0] * 255), expected)
    np.testing.assert_array_equal(dataset.train_labels, arrays["train-labels-idx1-ubyte"])


def test_sets_that_share_file_names_are_not_mixed(tmp_path):
    write_idx(tmp_path)
    write_idx(tmp_path / "fashion")
    (tmp_path / "fashion" / "t10k-labels-idx1-ubyte").unlink()
    data.load("mnist", tmp_path)
    with pytest.raises(data.DataError, match=r"fashion.t10k-labels-idx1-ubyte: .*no such file"):
        data.load("fashion", tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_cifar_round_trip(tmp_path, nested, tiny_cifar):
    records = write_cifar(tmp_path / data.CIFAR_FOLDER if nested else tmp_path)
    dataset = data.load("cifar10", tmp_path)
    assert_sane(dataset, 5 * RECORDS, RECORDS, (32, 32, 3))
    row = records["data_batch_2.bin"][1]  # the red plane comes first, row by row
    image = np.rint(dataset.train_images[RECORDS + 1] * 255)
    np.testing.assert_array_equal(image[..., 0].ravel(), row[1:1025])
    np.testing.assert_array_equal(image[..., 2].ravel(), row[2049:])
    assert dataset.train_labels[RECORDS + 1] == row[0]


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD_IMAGES, GOOD_LABELS = idx(pixels(12, 28, 28)), idx(np.zeros(12, np.uint8))
ZIPPED = gzip.compress(GOOD_IMAGES)
CORRUPT = ZIPPED[:2000] + bytes(100) + ZIPPED[2100:]  # a damaged stream, not a short one
HUGE = struct.pack(">4I", 0x803, 2**32 - 1, 28, 28)  # must not be believed and allocated

FAULTS = {  # case: (file, its content or None for missing, words of the message)
    "missing images": (IMAGES, None, "this file (or .gz), found no such file"),
    "missing labels": (LABELS, None, "this file (or .gz), found no such file"),
    "empty": (IMAGES, b"", "16 bytes of an IDX header, found 0 bytes"),
    "short header": (LABELS, b"\0\0\x08\x01\0", "8 bytes of an IDX header, found 5 bytes"),
    "truncated": (IMAGES, GOOD_IMAGES[:-1], "9424 bytes, as its header says (12 examples)"),
    "too long": (LABELS, GOOD_LABELS + b"\0", "expected 20 bytes, as its header says"),
    "huge count": (IMAGES, HUGE, "found 16 bytes"),
    "no examples": (IMAGES, idx(pixels(0, 28, 28)), "expected at least one example"),
    "bad magic": (IMAGES, idx(pixels(12, 28, 28), 0x0D03), "0x00000803 (IDX images), found 0x0"),
    "labels as images": (IMAGES, idx(np.zeros(99, np.uint8)), "found 0x00000801 (labels)"),
    "images as labels": (LABELS, GOOD_IMAGES, "found 0x00000803 (images)"),
    "gzip by another name": (IMAGES, ZIPPED, "(gzip: name it .gz)"),
    "wrong dimensions": (IMAGES, idx(pixels(12, 32, 30)), "28 x 28 pixels, found images of 32 x"),
    "counts differ": (LABELS, idx(np.zeros(11, np.uint8)), "12 labels, one for each of train-"),
    "labels out of range": (LABELS, idx(np.arange(12, dtype=np.uint8)), "label 10 at example 10"),
    "not gzip": (IMAGES + ".gz", GOOD_IMAGES, "expected a complete gzip file"),
    "empty gzip": (IMAGES + ".gz", b"", "bytes"),
    "truncated gzip": (IMAGES + ".gz", ZIPPED[:-9], "expected a complete gzip file"),
    "corrupt gzip": (IMAGES + ".gz", CORRUPT, "expected a complete gzip file"),
    "a gzip of something else": (IMAGES + ".gz", gzip.compress(b"hello"), "found 5 bytes"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_idx_faults(tmp_path, case):
    name, content, words = FAULTS[case]
    write_idx(tmp_path)
    (tmp_path / name.removesuffix(".gz")).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_one_line("mnist", tmp_path, tmp_path / name, words)


CIFAR_FAULTS = {
    "missing": (None, "expected this file, found no such file"),
    "empty": (b"", "expected 9219 bytes (3 records of 3073), found 0 bytes"),
    "truncated": (bytes(9218), "found 9218 bytes"),
    "a record short": (bytes(6146), "found 6146 bytes"),
    "a label out of range": (bytes(3073) + b"\x0b" + bytes(6145), "label 11 at example 1 (1 such)"),
}


@pytest.mark.parametrize("case", CIFAR_FAULTS)
@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin"])
def test_cifar_faults(tmp_path, case, name, tiny_cifar):
    content, words = CIFAR_FAULTS[case]
    write_cifar(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_one_line("cifar10", tmp_path, tmp_path / name, words)


def test_other_faults(tmp_path):
    file = tmp_path / "file"
    file.touch()
    write_idx(tmp_path)
    (tmp_path / IMAGES).unlink()
    (tmp_path / IMAGES).mkdir()
    assert_one_line("mnist", tmp_path, tmp_path / IMAGES, "expected a readable file")
    assert_one_line("mnist", tmp_path / "no", tmp_path / "no", "a directory, found nothing there")
    assert_one_line("cifar10", file, file, "expected a directory, found a file")
    assert_one_line("fashion", None, "fashion", "--data-dir DIR")
    assert_one_line("imagenet", None, "data set", "one of digits, mnist, fashion, cifar10")


def assert_one_line(name, data_dir, path, words):
    with pytest.raises(data.DataError) as caught:
        data.load(name, data_dir)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ") and ", found " in message
    assert words in message and "\n" not in message


HEADERS = st.sampled_from([b"", GOOD_IMAGES[:16], GOOD_LABELS[:8], ZIPPED[:10], HUGE, ZIPPED])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(header=HEADERS, body=st.binary(max_size=64), suffix=st.sampled_from(["", ".gz"]))
def test_random_bytes_raise_nothing_but_data_errors(tmp_path_factory, header, body, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(header + body)
    for read in (data.read_idx_images, data.read_idx_labels, data.read_cifar10_batch):
        try:
            read(path)
        except data.DataError as error:
            assert "\n" not in str(error)


CIFAR_ROWS = np.random.default_rng(0).integers(0, 10, (RECORDS, 3073), np.uint8)
FILES = {  # a good file by name: its bytes, its reader, the array that they say and where it starts
    "images": (GOOD_IMAGES, data.read_idx_images, 16),
    "labels": (GOOD_LABELS, data.read_idx_labels, 8),
    "batch": (CIFAR_ROWS.tobytes(), data.read_cifar10_batch, 0),
}
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 9999), st.just(0)),
    st.tuples(st.just("more"), st.integers(1, 300), st.integers(0, 255)),
    st.tuples(st.just("change"), st.integers(0, 9999), st.integers(1, 255)),
    st.tuples(st.just("double"), st.integers(0, 9999), st.integers(1, 64)),
)


def damaged(content, how):
    """The bytes cut at a place, with more behind them, with one changed, or with some repeated."""
    kind, n, value = how
    at = n % len(content)
    if kind == "cut":
        return content[:at]
    if kind == "more":
        return content + bytes([value]) * n
    if kind == "change":
        return content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
    return content[: at + value] + content[at:]


def as_bytes(array):
    """What a reader returned, as the bytes behind the header of its file."""
    if not isinstance(array, tuple):
        return array.tobytes()
    images, labels = array
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], planes], axis=1).tobytes()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "zipped"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(how=DAMAGE)
def test_a_damaged_file_is_an_error_or_what_its_bytes_say(tmp_path_factory, name, zipped, how):
    """Never another array: a zipped one is the original, or an error; a plain one has every byte
    of its body, as many as its header says."""
    content, read, start = FILES[name]
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}{'.gz' * zipped}"
    written = damaged(gzip.compress(content, mtime=0) if zipped else content, how)
    path.write_bytes(written)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CIFAR_RECORDS", RECORDS)
        try:
            found = read(path)
        except data.DataError as error:
            assert str(error).startswith(f"{path}: expected ") and "\n" not in str(error)
            return
    said = content if zipped else written
    assert as_bytes(found) == said[start:]
    assert zipped or len(written) == len(content)


def test_scripts_print_the_line_and_exit_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        race.main(["--data", "mnist", "--data-dir", str(tmp_path)])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(str(tmp_path / IMAGES))


def test_the_shell_sees_the_line_and_the_code(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(b"short")
    command = [sys.executable, str(Path(race.__file__)), "--data", "cifar10"]
    command += ["--data-dir", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "data_batch_1.bin: expected 30730000 bytes" in result.stderr
