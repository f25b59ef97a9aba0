"""What is read of a node's GPUs, from the driver as it speaks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.executor.adapters.agent.gpus import GpuMeter, Gpus, load_nvml, read_gpus, read_minors
from services.executor.adapters.attempts.attempt_folder import Bind
from services.executor.adapters.cluster.ray_reservations import numbers_of
from services.executor.adapters.runtimes import cdi
from services.executor.domain.gpus import Use, free_gpus
from services.executor.ports import NoRoom

pytestmark = pytest.mark.unit
SPEC = """
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
- name: "0"
  containerEdits: {{deviceNodes: [{{path: /dev/nvidia5}}]}}
- name: all
  containerEdits:
    deviceNodes: [{{path: /dev/nvidia5}}]
    mounts: [{{hostPath: {folder}/nvidia-smi, containerPath: /usr/bin/nvidia-smi}}]
containerEdits:
  hooks: [{{hookName: createContainer, path: /usr/bin/nvidia-cdi-hook}}]
  mounts:
  - {{hostPath: {folder}/libcuda.so.550.54.15, containerPath: /usr/lib/libcuda.so.550.54.15}}
  - {{hostPath: {folder}/gone.so.1, containerPath: /usr/lib/gone.so.1}}
"""


@dataclass
class Driver:
    """NVML of a node with two cards, the first of which was found last and tells nobody what it draws."""

    class NVMLError(Exception):
        """As the library's own."""

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMinorNumber(self, device: int) -> int:  # noqa: N802
        return (5, 2)[device]

    def nvmlDeviceGetUtilizationRates(self, device: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=40 + device)

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=1 << 30)

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:  # noqa: N802
        if device == 0:
            raise self.NVMLError
        return 250_500


def test_a_gpus_device_node_is_the_drivers_number_and_not_ours() -> None:
    gpus = Gpus(minors=read_minors(Driver()))
    assert gpus.devices_of((1, 0)) == ["/dev/nvidia5", "/dev/nvidia2"], "in the order of the GPUs' numbers"
    assert gpus.devices_of(()) == []


def test_gpus_that_ray_was_only_told_of_have_no_devices() -> None:
    assert read_minors(None) == {}
    assert Gpus().devices_of((801, 802)) == []


def test_use_is_read_of_the_gpus_of_a_job_alone_and_without_what_a_card_does_not_tell() -> None:
    meter = GpuMeter(Driver())
    assert meter.read((1,)) == {
        "system/gpu_1_percent": 41.0,
        "system/gpu_1_memory_bytes": float(1 << 30),
        "system/gpu_1_power_watts": 250.5,
    }
    assert set(meter.read((0,))) == {"system/gpu_0_percent", "system/gpu_0_memory_bytes"}
    assert GpuMeter(None).read((0,)) == {}


def test_the_library_that_is_asked_has_what_we_ask_of_it() -> None:
    """The driver above is ours: these names are the package's."""
    pynvml = pytest.importorskip("pynvml")
    asked = [name for name in (*vars(Driver), "nvmlInit") if name.startswith("nvml")]
    assert len(asked) == 7
    assert all(callable(getattr(pynvml, name)) for name in asked)
    assert issubclass(pynvml.NVMLError, Exception)
    assert load_nvml() in (None, pynvml)


@pytest.mark.parametrize(
    ("said", "model", "memory_bytes"),
    [
        ("NVIDIA H100 80GB HBM3, 81559\n" * 8, "H100 80GB HBM3", 81559 << 20),
        ("NVIDIA A100-SXM4-40GB, 40960\nTesla T4, 15360\n", "A100-SXM4-40GB, Tesla T4", 15360 << 20),
        ("NVIDIA A30, [N/A]\n", "A30", 0),
        ("No devices were found\n", "", 0),
    ],
)
def test_gpus_are_read_from_what_the_driver_says(said: str, model: str, memory_bytes: int) -> None:
    assert read_gpus(said) == Gpus(model, memory_bytes)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, ...]:
    """Where specs are, beside a driver's files."""
    made = (tmp_path / "etc", tmp_path / "run")
    for folder in made:
        folder.mkdir()
    return made


def test_what_containers_are_told_are_names_that_the_specs_know(folders: tuple[Path, ...]) -> None:
    assert cdi.names_of((), folders) == []
    (folders[0] / "vendor.json").write_text('{"kind": "vendor.com/net", "devices": [{"name": "1"}]}')
    (folders[0] / "half-written.yaml").write_text("kind: [nvidia.com/gpu")
    with pytest.raises(cdi.NoDevices, match="nvidia-ctk cdi generate"):
        cdi.names_of((0,), folders)
    (folders[1] / "nvidia.yaml").write_text(SPEC.format(folder="/nowhere"))
    assert cdi.names_of((0,), folders) == ["nvidia.com/gpu=0"]
    with pytest.raises(
        cdi.NoDevices, match="know no GPU 1, only 0, all; after a change of cards or driver, `nvidia-ctk"
    ):
        cdi.names_of((1, 0), folders)


def test_a_root_without_engine_gets_the_drivers_files_by_every_name_that_is_asked_for(
    folders: tuple[Path, ...], tmp_path: Path
) -> None:
    library, tool = tmp_path / "libcuda.so.550.54.15", tmp_path / "nvidia-smi"
    for path in (library, tool):
        path.write_text("")
    (tmp_path / "libcuda.so.1").symlink_to(library.name)
    (tmp_path / "libcuda.so").symlink_to("libcuda.so.1")
    (tmp_path / "libcuda.so.1.old").write_text("")
    (folders[0] / "nvidia.yaml").write_text(SPEC.format(folder=tmp_path))
    assert cdi.driver_binds(folders) == [
        Bind(str(tool), "/run/nvidia/bin/nvidia-smi"),
        *(Bind(str(library), f"/run/nvidia/lib/{name}") for name in ("libcuda.so", "libcuda.so.1", library.name)),
    ]


@pytest.mark.parametrize(
    ("given", "milli", "used", "found"),
    [
        ((0, 1), 1000, [], [0, 1]),
        ((0,), 500, [((0,), 500)], [0]),
        ((0,), 500, [((0,), 600), ((2,), 300)], [2]),
        ((0,), 1000, [((0,), 100), ((1,), 1000)], [2]),
        ((0, 1), 1000, [((1,), 1000)], [0, 2]),
        ((0, 1), 1000, [((1,), 1000), ((2,), 1)], None),
        ((5,), 1000, [((5,), 1000)], None),
    ],
)
def test_gpus_are_rays_unless_somebody_is_on_them(
    given: tuple[int, ...], milli: int, used: list[tuple[tuple[int, ...], int]], found: list[int] | None
) -> None:
    others = [Use("n", indices, share) for indices, share in used] + [Use("other", (0, 1, 2), 1000)]
    answer = free_gpus([Use("n", given, milli)], others, {"n": 3})
    assert answer == (None if found is None else [found])


def test_gpus_without_numbers_are_told_of_with_the_way_out() -> None:
    assert numbers_of(("10", "2")) == (2, 10)
    with pytest.raises(NoRoom, match=r"calls a GPU of the node MIG-41b3.*without CUDA_VISIBLE_DEVICES or with numbers"):
        numbers_of(("0", "MIG-41b3"))


def test_ranks_of_a_gang_are_not_put_on_one_gpu() -> None:
    both = [Use("n", (0,), 1000), Use("n", (1,), 1000)]
    assert free_gpus(both, [Use("n", (0,), 1000)], {"n": 3}) == [[1], [2]]
