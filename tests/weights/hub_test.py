import sys

import pytest

from pconv_jax._errors import UserError
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
    monkeypatch.setenv("PCONV_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_path("a.pth") == tmp_path / ".cache" / "pconv_jax" / "a.pth"
    monkeypatch.setenv("PCONV_VGG16", "~/vgg.pth")
    assert hub.named_path("PCONV_VGG16") == tmp_path / "vgg.pth"
    monkeypatch.setenv("PCONV_VGG16", "")
    assert hub.named_path("PCONV_VGG16") is None
