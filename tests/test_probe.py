"""`memplan probe`, against a stand-in for NVIDIA's library: the C functions under pynvml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memplan.gpus.nvml import Unknown, derived, known
from memplan.gpus.processes import shares_numbers
from memplan.gpus.visible import Device, ordinals, visible
from memplan.units import GIB, MIB

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).parent / "nvml" / "standin.c"
Done = subprocess.CompletedProcess[str]
DRIVER = "driver\t580.159.04\t13000"


def card(
    name: str = "NVIDIA H100 80GB HBM3",
    uuid: str = "GPU-aaaaaaaa-1",
    bus: str = "00000000:19:00.0",
    total: int = 81559 * MIB,
    used: int = 0,
    capability: tuple[int, int] = (9, 0),
    ecc: int = 1,
    virtualization: int = 0,
    mig: int = 0,
) -> str:
    fields = ("card", name, uuid, bus, total, 628 * MIB, used, *capability, ecc, virtualization, mig)
    return "\t".join(map(str, fields))


SECOND = card(uuid="GPU-bbbbbbbb-2", bus="00000000:3B:00.0")
A100_SPLIT = card(
    "NVIDIA A100-SXM4-40GB", "GPU-cccccccc-3", "00000000:5E:00.0", 40960 * MIB, 0, (8, 0), mig=1
)
SLICE = f"slice\t0\tNVIDIA A100-SXM4-40GB MIG 1g.5gb\tMIG-dddddddd-4\t{4864 * MIB}\t{13 * MIB}\t7\t0\t14"


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The stand-in as a driver of today, and as one that lacks what came after 2020."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in with")
    built = {}
    for name, flags in (("new", []), ("old", ["-DOLD"])):
        directory = tmp_path_factory.mktemp(name)
        library = directory / "libnvidia-ml.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", library, SOURCE], check=True)
        built[name] = directory
    return built


class Machine:
    """Runs `memplan` where the driver is the stand-in."""

    def __init__(self, libraries: dict[str, Path], tmp_path: Path) -> None:
        self.libraries, self.answers = libraries, tmp_path / "answers"

    def run(self, lines: list[str], *arguments: str, driver: str = "new", **variables: str) -> Done:
        return self.python(lines, "-m", "memplan", *arguments, driver=driver, **variables)

    def python(self, lines: list[str], *arguments: str, driver: str = "new", **variables: str) -> Done:
        self.answers.write_text("\n".join([DRIVER, *lines]) + "\n")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "PYTORCH_"))}
        env |= {
            "LD_LIBRARY_PATH": str(self.libraries[driver]),
            "NVML_STANDIN": str(self.answers),
            **variables,
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    def probe(self, lines: list[str], code: int = 0, **options: str) -> dict[str, Any]:
        done = self.run(lines, "probe", "--format", "json", **options)
        assert done.returncode == code, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def card(self, lines: list[str], code: int = 0, **options: str) -> dict[str, Any]:
        found: dict[str, Any] = self.probe(lines, code, **options)["cards"][0]
        return found


@pytest.fixture
def machine(libraries: dict[str, Path], tmp_path: Path) -> Machine:
    return Machine(libraries, tmp_path)


def test_everything_of_a_card(machine: Machine) -> None:
    me = os.getpid()
    lines = [card(used=11 * GIB), f"process\t0\t{me}\t{10 * GIB}", "process\t0\t4000000\t-1"]
    found = machine.probe(lines)
    assert (found["driver"], found["cuda"], found["complete"]) == ("580.159.04", "13.0", True)
    (first,) = found["cards"]
    processes = first.pop("processes")
    assert first == {
        "index": 0,
        "ordinal": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": "GPU-aaaaaaaa-1",
        "pci_bus_id": "00000000:19:00.0",
        "total_bytes": 81559 * MIB,
        "torch_total_bytes": 85_017_493_504,
        "torch_total_seen": True,
        "reserved_bytes": 628 * MIB,
        "used_bytes": 11 * GIB,
        "free_bytes": 81559 * MIB - 628 * MIB - 11 * GIB,
        "ecc": True,
        "compute_capability": [9, 0],
        "multiprocessor_count": 132,
        "virtualization": "none",
        "mig": False,
        "slices": [],
        "instances": [None, None],
        "bf16": True,
        "fp8": True,
        "hidden_bytes": None,
        "remarks": [],
        "unknown": {"hidden_bytes": "the driver can't tell"},
    }
    assert [(p["pid"], p["used_bytes"]) for p in processes] == [(me, 10 * GIB), (4_000_000, None)]
    if shares_numbers():
        assert "pytest" in processes[0]["command"] and processes[0]["user"]
    assert (processes[1]["command"], processes[1]["user"]) == (None, None)


def test_what_a_container_hides_is_said(machine: Machine) -> None:
    found = machine.card([card(used=11 * GIB)])
    assert (found["processes"], found["hidden_bytes"]) == ([], 11 * GIB)
    assert found["remarks"] == [
        "some memory is held by no process that is seen from here: a container hides the others'"
    ]


@pytest.mark.skipif(not shares_numbers(), reason="the driver numbers processes in another way here")
def test_a_command_line_is_shown_without_its_secrets(machine: Machine) -> None:
    code = "import time; time.sleep(60)"
    arguments = ["--token", "s3cr3t", "--api-key=s3cr3t", "hf_abcdefghijk", "\x1b[31mred"]
    sleeper = subprocess.Popen([sys.executable, "-c", code, *arguments])
    try:
        shown = machine.card([card(), f"process\t0\t{sleeper.pid}\t1"])["processes"][0]["command"]
    finally:
        sleeper.kill()
        sleeper.wait()
    assert "time.sleep" in shown
    for secret in ("s3cr3t", "hf_abc", "\x1b"):
        assert secret not in shown


def test_what_torch_may_take_leaves_out_the_drivers_share_once(machine: Machine) -> None:
    code = (
        "from memplan.gpus.probe import probe_cards; (c,) = probe_cards(); print(c.total_bytes, c.used_bytes)"
    )
    for driver, beside in (("new", 0), ("old", 628 * MIB - (81559 * MIB - 85_017_493_504))):
        done = machine.python([card(used=GIB)], "-c", code, driver=driver, PYTHONPATH=str(ROOT))
        assert done.stdout.split() == ["85017493504", str(GIB + beside)], done.stderr


def test_the_table(machine: Machine) -> None:
    done = machine.run([card(used=GIB), SECOND, "link\t0\t1\t18\t40\t1"], "probe", LC_ALL="C.UTF-8")
    assert done.stdout.splitlines() == [
        "Driver 580.159.04, CUDA up to 13.0",
        "",
        "GPU  CUDA                      total  torch sees      used       free",
        "  0     0  H100 80GB HBM3  79.65 GiB   79.18 GiB  1.00 GiB  78.03 GiB",
        "  1     1  H100 80GB HBM3  79.65 GiB   79.18 GiB       0 B  79.03 GiB",
        "",
        "       compute  bf16  fp8  ECC    UUID",
        "GPU 0      9.0   yes  yes  yes    GPU-aaaaaaaa-1",
        "GPU 1      9.0   yes  yes  yes    GPU-bbbbbbbb-2",
        "",
        "Processes",
        "  GPU 0      not seen from here  1.00 GiB",
        "",
        "Links",
        "  0–1: 18 NVLinks, PCIe NODE",
        "",
        "To know",
        "  GPU 0: some memory is held by no process that is seen from here: a container hides the others'",
    ]
    assert machine.run([card(), SECOND], "probe", "--format", "quiet").stdout == "79.17GiB,79.17GiB\n"


def test_links(machine: Machine) -> None:
    third = card(uuid="GPU-eeeeeeee-5", bus="00000000:9A:00.0")
    lines = [card(), SECOND, third, "link\t0\t1\t4\t10\t0", "link\t1\t2\t0\t50\t0"]
    assert machine.probe(lines)["links"] == [
        {"cards": [0, 1], "nvlinks": 4, "pcie": "PIX"},
        {"cards": [0, 2], "nvlinks": 0, "pcie": None},
        {"cards": [1, 2], "nvlinks": 0, "pcie": "SYS"},
    ]
    lines += ["fail\tnvmlDeviceGetNvLinkState\t3\t-1"]
    assert [link["nvlinks"] for link in machine.probe(lines)["links"]] == [0, 0, 0]
    lines[-1] = "fail\tnvmlDeviceGetNvLinkState\t999\t-1"
    assert [link["nvlinks"] for link in machine.probe(lines)["links"]] == [None] * 3


def test_a_card_in_slices(machine: Machine) -> None:
    found = machine.probe([A100_SPLIT, SLICE, f"process\t1\t4000000\t{12 * MIB}"])
    (whole,) = found["cards"]
    (part,) = whole["slices"]
    assert (whole["mig"], whole["ordinal"], part["ordinal"]) == (True, None, 0)
    assert (part["uuid"], part["instances"], part["total_bytes"]) == ("MIG-dddddddd-4", [7, 0], 4864 * MIB)
    assert (part["multiprocessor_count"], part["compute_capability"], part["fp8"]) == (14, [8, 0], False)
    assert part["torch_total_seen"] is False
    assert [p["used_bytes"] for p in part["processes"]] == [12 * MIB]
    assert found["visible"] == ["MIG-dddddddd-4"]


def test_slices_that_this_user_may_not_see(machine: Machine) -> None:
    lines = [A100_SPLIT, "fail\tnvmlDeviceGetMaxMigDeviceCount\t4\t-1"]
    assert machine.card(lines, code=3)["remarks"] == [
        "MIG is on and no slice can be seen, so CUDA sees nothing of it"
    ]


def test_a_virtual_gpu(machine: Machine) -> None:
    found = machine.card([card("GRID A100-10C", "GPU-f", total=10240 * MIB, virtualization=2, ecc=-1)])
    assert (found["virtualization"], found["torch_total_seen"], found["ecc"]) == ("vgpu", False, None)
    assert found["unknown"] == {"ecc": "not supported"}
    assert found["remarks"] == [
        "a virtual GPU: the figures are of its share; other machines' use of the card is not seen"
    ]


def test_memory_shared_with_the_system(machine: Machine) -> None:
    fails = [f"fail\tnvmlDeviceGetMemoryInfo{version}\t3\t-1" for version in ("", "_v2")]
    found = machine.card([card("NVIDIA GB10", capability=(12, 1)), *fails], code=3)
    unknown = (
        "total_bytes",
        "torch_total_bytes",
        "used_bytes",
        "free_bytes",
        "reserved_bytes",
        "hidden_bytes",
    )
    assert {name: found[name] for name in unknown} == dict.fromkeys(unknown)
    assert {found["unknown"][name] for name in unknown} == {"not supported"}
    assert found["remarks"] == ["shares the system's memory, so the driver has no figures of its own for it"]


@pytest.mark.parametrize("function", ["nvmlDeviceGetHandleByIndex_v2", "every"])
def test_a_lost_gpu_beside_a_good_one(machine: Machine, function: str) -> None:
    asked = ("Name", "UUID", "MemoryInfo", "MemoryInfo_v2", "ComputeRunningProcesses_v3", "EccMode")
    functions = [f"nvmlDeviceGet{name}" for name in asked] if function == "every" else [function]
    found = machine.probe([card(), SECOND, *(f"fail\t{name}\t15\t0" for name in functions)], code=3)
    lost, good = found["cards"]
    assert lost["remarks"] == [
        "lost: the driver can't reach it any more; a reset or a reboot may bring it back"
    ]
    assert lost["unknown"]["total_bytes"] == "the GPU is lost"
    assert (lost["name"], lost["total_bytes"], lost["used_bytes"]) == (None, None, None)
    assert (good["total_bytes"], good["used_bytes"]) == (81559 * MIB, 0)
    assert found["complete"] is False
    assert (
        machine.probe(
            [card(), SECOND, *(f"fail\t{name}\t15\t0" for name in functions)],
            CUDA_VISIBLE_DEVICES="GPU-bbbbbbbb-2",
        )["complete"]
        is True
    )


def test_processes_that_this_user_may_not_see(machine: Machine) -> None:
    fails = [f"fail\tnvmlDeviceGetComputeRunningProcesses_{v}\t4\t-1" for v in ("v2", "v3")]
    found = machine.card([card(used=GIB), *fails])
    assert (found["processes"], found["unknown"]["processes"]) == (None, "no permission")
    assert found["hidden_bytes"] is None
    assert found["remarks"] == ["this user may not see its processes"]


def test_a_driver_without_the_newer_functions(machine: Machine) -> None:
    found = machine.card([card(used=GIB), f"process\t0\t4000000\t{GIB}"], driver="old")
    assert found["used_bytes"] == GIB + 628 * MIB  # its first version counts the driver's share as used
    assert found["unknown"]["reserved_bytes"] == "this driver can't tell"
    assert [p["used_bytes"] for p in found["processes"]] == [GIB]
    assert found["mig"] is False


@pytest.mark.parametrize(
    ("lines", "code", "reference", "context"),
    [
        (
            ["fail\tnvmlInitWithFlags\t9\t-1"],
            2,
            "no-gpu-found",
            "NVIDIA's driver is installed but not loaded",
        ),
        (["fail\tnvmlInitWithFlags\t999\t-1"], 2, "no-gpu-found", "NVML does not start: Unknown Error"),
        (["fail\tnvmlInitWithFlags\t4\t-1"], 3, "no-gpu-permission", None),
        (["fail\tnvmlInitWithFlags\t18\t-1"], 3, "gpu-driver-mismatch", None),
        (["fail\tnvmlDeviceGetCount_v2\t999\t-1"], 2, "no-gpu-found", None),
        ([], 2, "no-gpu-found", "The driver reports no card"),
    ],
)
def test_without_anything_to_show(
    machine: Machine, lines: list[str], code: int, reference: str, context: str | None
) -> None:
    error = machine.probe(lines, code)["error"]
    assert (error["reference"], error["exit_code"]) == (reference, code)
    assert context is None or error["context"] == context
    assert error["hint"]


def test_without_the_library(machine: Machine, tmp_path: Path) -> None:
    error = machine.probe([card()], 2, LD_LIBRARY_PATH=str(tmp_path))["error"]
    assert error["context"] == "NVML, which comes with NVIDIA's driver, is not installed (libnvidia-ml.so.1)"


def test_it_imports_no_torch(machine: Machine) -> None:
    code = "import sys; from memplan.cli import main; main(); print(*sys.modules, file=sys.stderr)"
    done = machine.python([card()], "-c", code, "probe")
    assert done.returncode == 0
    assert not {"torch", "transformers", "rich", "numpy"} & set(done.stderr.split())


def test_watching_draws_again(machine: Machine) -> None:
    code = (
        "import itertools, time\n"
        "looks = itertools.count()\n"
        "time.sleep = lambda seconds: next(looks) < 2 or exit(0)\n"
        "from memplan.cli import main; main()"
    )
    done = machine.python([card()], "-c", code, "probe", "--format", "json", "--watch")
    assert [json.loads(line)["cards"][0]["ordinal"] for line in done.stdout.splitlines()] == [0, 0, 0]
    assert machine.run([card()], "probe", "--watch", "0").returncode == 2


def test_the_cards_that_check_plans_for(machine: Machine) -> None:
    code = "from memplan.gpus.probe import probe_cards; print(*probe_cards(), sep='\\n')"
    done = machine.python([card(used=10 * GIB), SECOND], "-c", code, CUDA_VISIBLE_DEVICES="1,0")
    spec = "CardSpec(name='NVIDIA H100 80GB HBM3', total_bytes=85017493504, compute_capability=(9, 0), "
    spec += "total_known='probed', multiprocessor_count=132, used_bytes="
    assert done.stdout.splitlines() == [f"{spec}0)", f"{spec}{10 * GIB})"]


@pytest.mark.parametrize(
    ("lines", "code", "reference", "variables"),
    [
        ([card()], 2, "no-gpu-found", {"CUDA_VISIBLE_DEVICES": "-1"}),
        ([A100_SPLIT], 2, "no-gpu-found", {}),
        ([card(), "fail\tnvmlDeviceGetHandleByIndex_v2\t15\t0"], 3, "gpu-memory-unknown", {}),
    ],
)
def test_check_says_why_it_has_no_card(
    machine: Machine, lines: list[str], code: int, reference: str, variables: dict[str, str]
) -> None:
    done = machine.run(lines, "check", "gpt2", "--format", "json", **variables)
    assert done.returncode == code
    assert json.loads(done.stdout)["error"]["reference"] == reference


# --- CUDA's numbers ----------------------------------------------------------------------------------------

PLAIN = [Device("GPU-aaaaaaaa-1", "H100"), Device("GPU-bbbbbbbb-2", "H100")]
MIXED = [Device("GPU-aaaaaaaa-1", "RTX 3060"), Device("GPU-bbbbbbbb-2", "RTX 4090")]
SPLIT = [
    Device("GPU-aaaaaaaa-1", "A100", is_split=True),
    Device("MIG-cccccccc-3", "A100 1g", 0, (7, 0)),
    Device("MIG-dddddddd-4", "A100 1g", 0, (8, 0)),
    Device("GPU-bbbbbbbb-2", "A100"),
]


@pytest.mark.parametrize(
    ("devices", "wanted", "expected"),
    [
        (PLAIN, None, [0, 1]),
        (PLAIN, "1,0", [1, 0]),
        (PLAIN, " 1 ", [1]),
        (PLAIN, "1,7,0", [1]),
        (PLAIN, "GPU-bbbb", [1]),
        (PLAIN, "GPU-bbbb,0", [1, 0]),
        (SPLIT, None, [1]),
        (SPLIT, "0", [1]),
        (SPLIT, "1", [3]),
        (SPLIT, "MIG-dddddddd-4", [2]),
        (SPLIT, "MIG-GPU-aaaaaaaa-1/8/0", [2]),
        (SPLIT, "MIG-GPU-aaaaaaaa-1/9/0", []),
        (SPLIT, "MIG-cccccccc-3,MIG-dddddddd-4", [1]),
        (SPLIT, "1,0", [1]),
        (SPLIT[:1], None, []),
        *((PLAIN, none, []) for none in ("", "-1", "0,0", "GPU-", "GPU-c", "NoDevFiles", "99999999999", "²")),
    ],
)
def test_what_cuda_sees(devices: list[Device], wanted: str | None, expected: list[int]) -> None:
    environment = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    assert visible(devices, environment) == expected


def test_the_order_of_unlike_cards_is_cudas_own() -> None:
    assert isinstance(ordinals(MIXED, {}), Unknown)
    assert isinstance(ordinals(MIXED, {"CUDA_VISIBLE_DEVICES": "1"}), Unknown)
    assert ordinals(MIXED, {"CUDA_VISIBLE_DEVICES": "GPU-bbbb,GPU-aaaa"}) == {1: 0, 0: 1}
    assert ordinals(MIXED, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == {0: 0, 1: 1}


def test_the_unknown_goes_through_every_question() -> None:
    unknown = Unknown("no permission", 4)
    assert derived(lambda a, b: a + b, 1, 2) == 3
    assert derived(lambda a, b: a + b, 1, unknown) is unknown
    assert (known(unknown), known(0)) == (None, 0)
