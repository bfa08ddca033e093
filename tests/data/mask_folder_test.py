import cv2
import numpy as np
import pytest

from pconv_jax import UserError
from pconv_jax.data.decode import UnreadableImageError
from pconv_jax.data.mask_folder import MaskFolder, augment


def holes(mask):
    return int(np.sum(np.asarray(mask) == 0))


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def folder(tmp_path):
    """Two images: a white square of 16x16 on black, and one of 8x8."""
    for name, side in (("a.png", 16), ("b.png", 8)):
        image = np.zeros((32, 32), np.uint8)
        image[8 : 8 + side, 4 : 4 + side] = 255
        write(tmp_path / name, image)
    return tmp_path


def square_mask(size, side):
    mask = np.ones((size, size, 1), np.uint8)
    low = (size - side) // 2
    mask[low : low + side, low : low + side] = 0
    return mask


def test_folder_polarity(folder):
    white, black = MaskFolder(folder), MaskFolder(folder, hole_color="black")
    assert len(white) == len(black) == 2
    for i, side in enumerate((16, 8)):
        assert white[i].shape == (32, 32, 1)
        assert white[i].dtype == np.uint8
        assert holes(white[i]) == side**2
        np.testing.assert_array_equal(white[i], 1 - black[i])
        assert white[i][8, 4, 0] == 0 and white[i][7, 4, 0] == 1


@pytest.mark.parametrize("threshold, hole_columns", [(0.3, 3), (0.6, 2), (0.9, 1)])
def test_folder_threshold(tmp_path, threshold, hole_columns):
    image = np.tile(np.array([0, 128, 192, 255], np.uint8), (4, 1))
    write(tmp_path / "a.png", image)
    mask = MaskFolder(tmp_path, threshold=threshold)[0]
    assert holes(mask) == 4 * hole_columns


def test_folder_is_recursive_and_sorted_and_reads_every_format(tmp_path, monkeypatch):
    names = ["b/1.jpg", "a.png", "b/0.webp", "c.JPEG", "b/c/2.png"]
    for i, name in enumerate(names):
        image = np.zeros((16, 16, 3), np.uint8)
        image[: 2 * i + 2] = 255
        write(tmp_path / name, image)
    (tmp_path / "notes.txt").write_text("not a mask")
    (tmp_path / "._a.png").write_text("what macOS leaves beside a file")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = MaskFolder("~")
    found = [path.relative_to(tmp_path).as_posix() for path in folder.paths]
    assert found == sorted(names)
    for name, mask in zip(found, folder, strict=True):
        assert holes(mask) == 16 * (2 * names.index(name) + 2)


@pytest.mark.parametrize("root", [".", ".hidden", ".hidden/below"])
def test_folder_leaves_out_what_is_hidden_below_it(tmp_path, root):
    root = tmp_path / root
    others = ["._a.png", ".ipynb_checkpoints/a-checkpoint.png", "b/.c/d/e.png"]
    for name in ("a.png", "b/1.png", *others):
        write(root / name, np.zeros((8, 8), np.uint8))
    assert MaskFolder(root).paths == [root / "a.png", root / "b/1.png"]


def test_folder_reads_linked_folders_once(tmp_path):
    write(tmp_path / "disk/1.png", np.zeros((8, 8), np.uint8))
    root = tmp_path / "masks"
    root.mkdir()
    for link, target in {"b": "disk", "a": "disk", "loop": "masks"}.items():
        (root / link).symlink_to(tmp_path / target)
    assert MaskFolder(root).paths == [root / "a/1.png"]


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_folder_names_the_file_that_cannot_be_read(folder, content):
    if content == "truncated":
        content = (folder / "a.png").read_bytes()[:40]
    (folder / "bad.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match="cannot read .*bad.png: "):
        MaskFolder(folder)[2]


def test_folder_refuses(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has none.*empty"):
        MaskFolder(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder.*missing"):
        MaskFolder(tmp_path / "missing")
    with pytest.raises(UserError, match="hole_color must be 'white' or 'black'"):
        MaskFolder(folder, hole_color="red")
    with pytest.raises(UserError, match="threshold"):
        MaskFolder(folder, threshold=153)
    with pytest.raises(UserError, match="hole_ratio must be .* got .0.3, 0.1."):
        MaskFolder(folder, hole_ratio=(0.3, 0.1))


def test_sample_keeps_to_the_range_and_else_takes_the_closest(folder):
    rng = np.random.default_rng(0)
    options = dict(dilate=None, rotate=False, shift=False, crop=False)
    # 16 x 16 of 32 x 32 is 0.25, 8 x 8 is 0.0625.
    for hole_ratio, area in (((0.1, 0.3), 256), ((0.5, 0.6), 256), ((0.01, 0.02), 64)):
        source = MaskFolder(folder, hole_ratio=hole_ratio)
        for _ in range(10):
            assert holes(source.sample(rng, 32, **options)) == area


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tries=0), "tries"),
        (dict(size=0), "size"),
        (dict(dilate=(9, 3)), "dilate"),
    ],
)
def test_sample_refuses(folder, options, message):
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=message):
        MaskFolder(folder).sample(rng, **{"size": 32, **options})


OFF = dict(dilate=None, rotate=False, shift=False, crop=False)


@pytest.mark.parametrize("shape", [(32, 32, 1), (33, 33, 1)])
def test_augment_with_all_off_is_the_identity(shape):
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, shape, np.uint8)
    np.testing.assert_array_equal(augment(mask, shape[0], rng, **OFF), mask)


def test_augment_takes_the_central_square_and_scales():
    mask = np.ones((16, 24, 1), np.uint8)
    mask[4:8, 4:12] = 0
    scaled = augment(mask, 32, np.random.default_rng(0), **OFF)
    expected = np.ones((32, 32, 1), np.uint8)
    expected[8:16, :16] = 0
    np.testing.assert_array_equal(scaled, expected)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_augment_dilates_by_the_diameter_asked_for_at_512(size):
    mask = square_mask(size, size // 4)
    options = {**OFF, "dilate": (40, 40)}
    mask = augment(mask, size, np.random.default_rng(0), **options)
    row = mask[size // 2, :, 0]
    assert abs(holes(row) - (size // 4 + 40 * size // 512)) <= 2


def test_augment_leaves_a_mask_without_holes_alone():
    mask = np.ones((32, 32, 1), np.uint8)
    for seed in range(5):
        out = augment(mask, 48, np.random.default_rng(seed))
        assert out.shape == (48, 48, 1) and out.all()


def test_what_augment_uncovers_is_valid():
    mask = np.zeros((64, 64, 1), np.uint8)
    rng = np.random.default_rng(0)
    shifted = augment(mask, 64, rng, **{**OFF, "shift": True})
    rows, columns = (shifted[..., 0] == 0).any(1), (shifted[..., 0] == 0).any(0)
    assert 48 <= rows.sum() < 64 or 48 <= columns.sum() < 64
    assert holes(shifted) == rows.sum() * columns.sum()
    turned = augment(mask, 64, rng, **{**OFF, "rotate": True})
    assert np.mean(turned == 0) < 0.97
    assert holes(turned[24:40, 24:40]) == 256


def test_augment_rotation_keeps_the_area_and_the_center():
    mask = square_mask(128, 40)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        turned = augment(mask, 128, rng, **{**OFF, "rotate": True})
        assert abs(holes(turned) - 1600) < 80
        assert abs(np.argwhere(turned[..., 0] == 0).mean(0) - 63.5).max() < 0.5


def test_augment_crop_enlarges():
    mask = square_mask(128, 40)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cropped = augment(mask, 128, rng, **{**OFF, "crop": True})
        assert 1500 <= holes(cropped) <= 4 * 1600 + 200


def test_augment_is_binary_and_follows_its_generator():
    mask = np.random.default_rng(1).integers(0, 2, (64, 80, 1), np.uint8)

    def draw(seed):
        return augment(mask, 48, np.random.default_rng(seed))

    for seed in range(5):
        out = draw(seed)
        assert out.shape == (48, 48, 1) and out.dtype == np.uint8
        assert set(np.unique(out)) <= {0, 1}
        np.testing.assert_array_equal(out, draw(seed))
    sparse = square_mask(64, 10)
    a, b = (augment(sparse, 48, np.random.default_rng(s)) for s in (0, 1))
    assert (a != b).any()


def test_augment_refuses_a_mask_without_its_channel():
    with pytest.raises(UserError, match=r"mask must be \[H, W, 1\]"):
        augment(np.ones((8, 8)), 8, np.random.default_rng(0))


@pytest.mark.parametrize("shape", [(40_000, 10), (10, 40_001), (33_000, 1)])
def test_long_masks(shape, tmp_path):
    mask = np.full(shape, 255, np.uint8)
    mask[shape[0] // 2 - 2 : shape[0] // 2 + 2] = 0
    write(tmp_path / "a.png", mask)
    folder = MaskFolder(tmp_path, hole_color="black", hole_ratio=(0, 1))
    result = folder.sample(np.random.default_rng(0), 16)
    assert result.shape == (16, 16, 1)


def test_the_ends_of_long_masks_do_not_matter():
    rng = np.random.default_rng(0)
    middle = rng.integers(0, 2, (20, 120, 1), np.uint8)
    ends = rng.integers(0, 2, (2, 20, 500, 1), np.uint8)
    long = np.concatenate([ends[0], middle, ends[1]], axis=1)
    for seed in range(50):
        short, whole = (
            augment(m, 16, np.random.default_rng(seed)) for m in (middle, long)
        )
        np.testing.assert_array_equal(short, whole)
