import io
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from pconv_jax import UserError
from pconv_jax.data import sources
from pconv_jax.data.decode import UnreadableImageError
from tests.helpers import ROOT
from tests.helpers.images import encode, photo, write_folder, write_tar


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


# Kinds of sources.


def test_folder_is_sorted_and_knows_suffixes(tmp_path):
    keys = ["b.JPG", "a/2.jpeg", "a/1.png", "a.webp", "z/y/x.TIF", "c.bmp"]
    others = ["notes.txt", "a/._1.png", ".cache/1.png", "jpg", "b.jpg.part"]
    write_folder(tmp_path, dict.fromkeys(keys + others, encode(photo())))
    source = sources.FolderSource(tmp_path)
    assert source.keys == sorted(keys)
    assert len(source) == 6
    assert source.name(0) == str(tmp_path / "a.webp")
    np.testing.assert_array_equal(source[0], photo())


def test_folder_follows_links_to_folders(tmp_path):
    write_folder(tmp_path / "disk", {"1.png": encode(photo())})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "disk")
    assert sources.FolderSource(tmp_path / "photos").keys == ["linked/1.png"]


def test_folder_reads_every_folder_once_where_it_comes_first(tmp_path):
    images = {key: encode(photo()) for key in ("1.png", "b/2.png", "b/c/3.png")}
    write_folder(tmp_path, images)
    links = {"loop": ".", "a": "b", "b/up": "..", "d": "b/c", "self": "self"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    source = sources.FolderSource(tmp_path)
    assert source.keys == ["1.png", "a/2.png", "a/c/3.png"]
    assert all(source[i].shape == (40, 60, 3) for i in range(3))


@pytest.mark.parametrize("root", [".hidden", ".hidden/below"])
def test_folder_may_be_hidden_itself(tmp_path, root):
    root = write_folder(
        tmp_path / root, dict.fromkeys(["1.png", "a/2.png", ".b/3.png"], b"")
    )
    (root / ".link").symlink_to(root / "a")
    assert sources.FolderSource(root).keys == ["1.png", "a/2.png"]


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        (sources.FolderSource, "path must be a folder of images, got .*nowhere"),
        (sources.TarSource, "path: there is no file or folder .*nowhere"),
    ],
)
def test_missing_or_empty_path_is_an_error(tmp_path, source, missing):
    with pytest.raises(UserError, match=missing):
        source(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    if source is sources.FolderSource:
        write_folder(empty, {"readme.txt": b"hello"})
    else:
        write_tar(empty, {"readme.txt": b"hello"})
    with pytest.raises(UserError, match=r"no image \(\.jpg, .*empty"):
        source(empty)


def test_file_that_is_gone_is_unreadable(tmp_path):
    write_folder(tmp_path, {"1.png": encode(photo())})
    source = sources.FolderSource(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UnreadableImageError, match=r"1\.png: No such file"):
        source[0]


def test_tar_equals_folder(tmp_path):
    images = {f"{n % 2}/{n}.png": encode(photo(seed=n)) for n in range(6)}
    folder = sources.FolderSource(write_folder(tmp_path / "photos", images))
    keys = list(images)
    write_tar(tmp_path / "1.tar", {f"./{k}": images[k] for k in keys[:4]})
    write_tar(tmp_path / "2.tar", {k: images[k] for k in keys[4:]} | {"x/._1.png": b""})
    for paths in (
        tmp_path / "*.tar",
        [str(tmp_path / "2.tar"), str(tmp_path / "1.tar")],
    ):
        tar = pickle.loads(pickle.dumps(sources.TarSource(paths)))
        assert tar.keys == folder.keys
        assert tar.name(0) == f"{tmp_path / '1.tar'}:0/0.png"
        for index in range(6):
            np.testing.assert_array_equal(tar[index], folder[index])


@pytest.mark.parametrize("damage", ["compressed", "cut", "text"])
def test_damaged_tar_is_an_error(tmp_path, damage):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    images = {f"{n}.png": encode(noise) for n in range(4)}
    path = tmp_path / "photos.tar"
    if damage == "compressed":
        write_tar(path, images, "w:gz")
    elif damage == "cut":
        write_tar(path, images)
        path.write_bytes(path.read_bytes()[:30_000])
    else:
        path.write_text("not a tar file" * 100)
    with pytest.raises(UserError, match=r"path must be an uncompressed, whole tar"):
        sources.TarSource(path)


def test_bundled_photos_are_disjoint_and_decode():
    names = {}
    for split, count in {"train": 3, "validation": 2}.items():
        source = sources.BundledSource(split)
        assert len(source) == count
        names[split] = {source.name(i) for i in range(count)}
        for index in range(count):
            image = source[index]
            assert image.ndim == 3 and min(image.shape[:2]) >= 300
            assert np.ptp(image.astype(int), axis=-1).mean() > 5  # In color.
    assert not names["train"] & names["validation"]


# Opening.


def test_hold_out_is_disjoint_complete_and_stable(tmp_path):
    content = encode(photo(4, 4))
    write_folder(tmp_path, {f"{n}.png": content for n in range(200)})

    def names(split):
        source = sources.open_source(
            "folder", split=split, path=tmp_path, validation_fraction=0.1
        )
        return {source.name(i) for i in range(len(source))}

    train, validation = names("train"), names("validation")
    assert not train & validation
    assert len(train) + len(validation) == 200
    assert 8 <= len(validation) <= 35
    write_folder(tmp_path, {f"new/{n}.png": content for n in range(100)})
    assert train < names("train") and validation < names("validation")


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3])
def test_hold_out_leaves_no_side_empty(tmp_path, count, fraction):
    path = write_tar(
        tmp_path / "x.tar", {f"{n}.png": encode(photo()) for n in range(count)}
    )
    sizes = [
        len(
            sources.open_source("tar", split=s, path=path, validation_fraction=fraction)
        )
        for s in ("train", "validation")
    ]
    assert sum(sizes) == count and min(sizes) > 0


def test_hold_out_of_tar_and_folder_agree(tmp_path):
    images = {f"{n}.png": encode(photo(4, 4, n)) for n in range(30)}
    folder = write_folder(tmp_path / "photos", images)
    tar = write_tar(tmp_path / "photos.tar", images)
    one = sources.open_source("folder", split="train", path=folder)
    other = sources.open_source("tar", split="train", path=tar)
    assert len(one) == len(other)
    for index in range(len(one)):
        np.testing.assert_array_equal(one[index], other[index])


def test_the_only_image_is_trained_on(tmp_path):
    write_folder(tmp_path, {"1.png": encode(photo())})
    assert len(sources.open_source("folder", split="train", path=tmp_path)) == 1
    with pytest.raises(UserError, match=r"only one image, .*give a validation_path"):
        sources.open_source("folder", split="validation", path=tmp_path)


def test_open_other_sources(tmp_path):
    one = write_folder(tmp_path / "1", {"1.png": encode(photo())})
    two = write_folder(tmp_path / "2", {"2.png": encode(photo())})
    for split, path in {"train": one / "1.png", "validation": two / "2.png"}.items():
        source = sources.open_source(
            "folder", split=split, path=one, validation_path=two
        )
        assert (len(source), source.name(0)) == (1, str(path))
    assert len(sources.open_source("bundled", split="validation")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "zip"},
            "kind must be 'bundled', .* or 'tfds', got 'zip'",
        ),
        ({"kind": "bundled", "split": "test"}, "split must be 'train' or 'validation'"),
        ({"kind": "folder"}, "path is needed for kind 'folder'"),
        ({"kind": "tfds"}, "name is needed for kind 'tfds'"),
    ],
)
def test_open_source_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        sources.open_source(**{"split": "train"} | arguments)


def test_a_folder_is_one_path(tmp_path):
    with pytest.raises(UserError, match="path must be one folder for kind 'folder'"):
        sources.open_source("folder", split="train", path=[str(tmp_path)])


@pytest.mark.parametrize(
    ("package", "kind"), [("tensorflow_datasets", "tfds"), ("skimage", "bundled")]
)
def test_a_missing_package_is_named_with_its_extra(package, kind):
    result = run(f"""
import sys
import tarfile
sys.modules["{package}"] = None
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "{package}" else find_spec(name)
from pconv_jax import UserError
from pconv_jax.data import sources
try:
    sources.open_source("{kind}", split="train", name="x")
except UserError as error:
    print(error)
""")
    assert "pip install 'pconv-jax[train]'" in result.stdout, result.stderr


def test_sources_import_neither_grain_nor_tfds():
    result = run("""
import sys
import tarfile
from pconv_jax.data import base, mask_folder, sources
print({"grain", "tensorflow_datasets", "absl", "skimage"} & set(sys.modules))
""")
    assert result.stdout == "set()\n", result.stderr


def test_sparse_and_endless_tar_files(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": b"abc", "b.png": b"abc"})
    data = bytearray(path.read_bytes())

    def with_size(text):
        changed = bytearray(data)
        changed[124:136] = text
        changed[148:156] = b" " * 8
        changed[148:156] = b"%06o\0 " % sum(changed[:512])
        path.write_bytes(changed)

    with_size(b"77777777777\0")
    with pytest.raises(UserError, match="uncompressed, whole tar file, got .*a.tar"):
        sources.TarSource(path)
    with_size(b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big"))  # Two blocks back.
    with pytest.raises(UserError, match="uncompressed, whole tar file, got .*a.tar"):
        sources.TarSource(path)
    member = tarfile.TarInfo("s.png")
    member.pax_headers = {
        **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        **{"GNU.sparse.name": "s.png", "GNU.sparse.realsize": str(10**15)},
    }
    content = b"1\n0\n3\n".ljust(512, b"\0") + b"abc"
    member.size = len(content)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match="s.png is sparse, or not all there"):
        sources.TarSource(path)


def test_pipes_in_folders_are_unreadable(tmp_path):
    write_folder(tmp_path, {"a.png": encode(photo())})
    os.mkfifo(tmp_path / "b.png")
    source = sources.FolderSource(tmp_path)
    with pytest.raises(UnreadableImageError, match="b.png: it is not a file, "):
        source[1]


def pax_field(name):
    """A field of a header: its length, its name and its value."""
    size = len(name) + 5
    while len(f"{size} {name}=a\n") != size:
        size += 1
    return f"{size} {name}=a\n".encode()


def test_headers_for_all_members_take_little_memory(tmp_path):
    # Python's reader copies them for each of the members.
    fields = b"".join(pax_field(str(i)) for i in range(20_000))
    header = tarfile.TarInfo("g")
    header.type, header.size = tarfile.XGLTYPE, len(fields)
    members = tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT) * 100
    padding = bytes(-len(fields) % 512)
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + fields + padding + members)
    with pytest.raises(UserError, match="a header for all members is too long"):
        sources.TarSource(path)
    many = b""
    for number in range(0, 1500, 50):
        fields = b"".join(pax_field(str(i)) for i in range(number, number + 50))
        header.size = len(fields)
        many += header.tobuf(tarfile.USTAR_FORMAT) + fields + bytes(-len(fields) % 512)
    path.write_bytes(many + members)
    with pytest.raises(UserError, match="headers for all members are too many"):
        sources.TarSource(path)


def test_a_comment_for_all_members_as_git_writes_it(tmp_path):
    content = encode(photo())
    member = tarfile.TarInfo("a.png")
    member.size = len(content)
    comment = {"comment": "1a71266" * 6}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=comment) as tar:
        tar.addfile(member, io.BytesIO(content))
    assert sources.TarSource(path).keys == ["a.png"]
