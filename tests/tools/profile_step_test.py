import pytest
from jax.profiler import ProfileData

from pconv_jax.runs.config import read_settings
from pconv_jax.train.experiment import open_experiment
from tests.train.loop_test import tiny
from tools import profile_step


@pytest.mark.usefixtures("fast_compilation")
def test_a_step_is_timed_and_has_no_gpu_kernels_on_a_cpu(tmp_path):
    experiment = open_experiment(read_settings(tiny(steps_per_call=1)))
    first, seconds, kernels = profile_step.measure(
        experiment, experiment.phases[1], tmp_path, calls=2
    )
    assert first > seconds > 0 and kernels == []
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_kernels_of_a_profile_are_summed(tmp_path):
    text = """
      planes {
        name: "/device:GPU:0"
        event_metadata { key: 1 value { id: 1 name: "conv" } }
        event_metadata { key: 2 value { id: 2 name: "add" } }
        lines {
          name: "Stream #13(Compute)"
          events { metadata_id: 2 duration_ps: 1000000000 }
          events { metadata_id: 1 duration_ps: 2500000000 }
          events { metadata_id: 1 duration_ps: 1500000000 }
        }
        lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 9000000000 } }
      }
      planes {
        name: "/host:CPU"
        event_metadata { key: 1 value { id: 1 name: "wait" } }
        lines { name: "Stream" events { metadata_id: 1 duration_ps: 9000000000 } }
      }
    """
    profile = ProfileData.text_proto_to_serialized_xspace(text)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "gpu.xplane.pb").write_bytes(profile)
    kernels = profile_step.read_kernels(tmp_path)
    assert [kernel.name for kernel in kernels] == ["conv", "add"]
    assert [kernel.launches for kernel in kernels] == [2, 1]
    times = [kernel.milliseconds for kernel in kernels]
    assert times == pytest.approx([4.0, 1.0])
