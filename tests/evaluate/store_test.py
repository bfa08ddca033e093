import pytest

from pconv_jax._errors import UserError
from pconv_jax.evaluate.store import Store

pytestmark = pytest.mark.usefixtures("fast_compilation")


def test_a_store_resumes_after_a_kill(tmp_path):
    place = {"method": "a", "hole_bin": 0, "border": True}
    store = Store(tmp_path)
    store.open("a", "x")
    store.add("a", [place | {"index": 0, "l1": 0.1}, place | {"index": 1, "l1": 0.2}])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    again = Store(tmp_path)
    again.open("a", "x")
    assert again.has("a", [(0, True, 0)]) and not again.has("a", [(0, True, 1)])
    again.add("a", [place | {"index": 1, "l1": 0.3}])
    third = Store(tmp_path)
    third.open("a", "x")
    keys = [(0, True, 0), (0, True, 1)]
    assert [r["l1"] for r in third.get("a", keys)] == [0.1, 0.3]
    third.open("a", "other images")
    assert not third.has("a", keys[:1])


def test_two_evaluations_cannot_share_a_directory(tmp_path):
    with Store(tmp_path).locked():
        with pytest.raises(UserError, match="another evaluation is writing to"):
            with Store(tmp_path).locked():
                pass
    with Store(tmp_path).locked():  # The lock ends with the block.
        pass
