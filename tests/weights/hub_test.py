import json
import sys

import numpy as np
import pytest

from pconv_jax._errors import UserError
from pconv_jax._files import FileContentError
from pconv_jax.weights import hub
from pconv_jax.weights.pretrained import from_pretrained
from pconv_jax.weights.vgg import load_vgg_params


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path))
    monkeypatch.delenv("PCONV_VGG16", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for load in (lambda: from_pretrained("someone/places"), load_vgg_params):
        with pytest.raises(UserError, match=r"pip install 'pconv-jax\[hub\]'"):
            load()
    assert not list(tmp_path.iterdir())


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path / "cache"))
    assert hub.cache_path("a.pth") == tmp_path / "cache" / "a.pth"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PCONV_CACHE", "~/cache")
    assert hub.cache_path("a.pth") == tmp_path / "cache" / "a.pth"
    monkeypatch.setenv("PCONV_VGG16", "~/vgg.pth")
    assert hub.named_path("PCONV_VGG16") == tmp_path / "vgg.pth"
    monkeypatch.setenv("PCONV_VGG16", "")
    assert hub.named_path("PCONV_VGG16") is None


def test_arrays_whose_description_does_not_fit_are_refused():
    good = {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]}
    array = np.arange(6, dtype="<f4")

    def read(header):
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(4) + array.tobytes()
        return hub._read_safetensors(lambda start, stop: data[start:stop], ["a"])

    np.testing.assert_array_equal(read({"a": good})["a"], array.reshape(2, 3))
    assert read({"b": 5}) == {}
    for change in [
        {"dtype": "F16"},
        {"shape": 6},
        {"shape": [2, "3"]},
        {"shape": [-2, -3]},
        {"shape": [2, 4]},
        {"data_offsets": [28, 4]},
        {"data_offsets": [-4, 20]},
        {"data_offsets": [4]},
    ]:
        with pytest.raises(FileContentError, match="a is not an array of F32, but"):
            read({"a": good | change})
    for header in [["a"], 5, {"a": 5}]:
        with pytest.raises(FileContentError, match="is not a"):
            read(header)


def test_a_name_that_the_hub_does_not_allow_cannot_be_downloaded():
    pytest.importorskip("huggingface_hub")
    with pytest.raises(hub.DownloadError, match="HFValidationError"):
        hub.download_repository_file("my--weights/a.safetensors", "b.safetensors")
