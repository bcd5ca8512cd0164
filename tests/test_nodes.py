"""A cluster of machines that share nothing but an object store: nodes die, the bytes stay."""

import subprocess
import sys
from dataclasses import dataclass

import psutil
import pytest
from PIL import Image

from tests import machines
from tests.chaos import real_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(sys.platform != "linux", reason="loopback has one address elsewhere"),
]
SETTINGS = {
    **real_run.SETTINGS,
    "embed.batch_size": 2,
    "embed.actors": 2,
    "train.words": 0,
}
COPY = """
import sys, fsspec
fs = fsspec.filesystem("s3")
what, *paths = sys.argv[1:]
if what == "put":
    [fs.mkdir(bucket) for bucket in ("given", "made")]
getattr(fs, what)(*paths, recursive=True)
"""
RERUNS = 2  # of a driver that ends with 1


@pytest.fixture(scope="module")
def cluster():
    """An object store, a head that takes no tasks, two workers of two CPUs each; a token."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7" * 64}
    keys = {"AWS_ACCESS_KEY_ID": "it", "AWS_SECRET_ACCESS_KEY": "works"}
    soon = {"RAY_health_check_period_ms": "1000"}  # a dead node is known in 5 s instead of 15
    with machines.cluster(**token, **keys, **soon, AWS_DEFAULT_REGION="us-east-1") as made:
        store, (port,) = made.add(), machines.free_ports(1)
        store.start(
            *(sys.executable, "-m", "moto.server", "-H", store.address, "-p", str(port))
        )  # it logs every request, and ends with its machine
        machines.wait_for(lambda: "Running on" in store.log_text(), store.log_text)
        made.environment["AWS_ENDPOINT_URL"] = f"http://{store.address}:{port}"
        for cpus in (0, 2, 2):
            made.join(cpus)
        print(f"\nmachines: {made.way}")
        yield made


def run(cluster, shards: str, root: str, address: str = ""):
    """`ratecluster run` on the head's machine; without an address, with a Ray of its own."""
    sets = [f"--set={name}={value}" for name, value in SETTINGS.items()]
    # --address wins over RAY_ADDRESS
    joins = ["RAY_ADDRESS=192.0.2.1:6379"] if address else [f"RAY_TMPDIR={cluster.head.folder}/own"]
    to = ["--address", address] if address else []
    command = ["env", *joins, *real_run.RATECLUSTER, "run", "--shards", shards, "--root", root]
    return cluster.head.start(*command, *sets, *to)


def copy(cluster, *words: str) -> None:
    assert cluster.head.run(sys.executable, "-c", COPY, *words) == 0, cluster.head.log_text()[
        -3000:
    ]


@dataclass
class Driver:
    """A run that is started again where it ends with 1, as its user would do."""

    cluster: machines.Cluster
    process: subprocess.Popen[bytes] | None = None
    runs: int = 0

    def goes_on(self) -> bool:
        """Whether it has work to do; False at its good end."""
        code = self.process.poll() if self.process else 1
        if code is not None and code != 0:
            assert code == 1 and self.runs <= RERUNS, self.cluster.head.log_text()[-3000:]
            address = self.cluster.ray_address
            self.process = run(self.cluster, "s3://given/shards", "s3://made/struck", address)
            self.runs += 1
        return code != 0

    def lose_one(self, title: str, written: str) -> None:
        """Once the store has a file of that name, kill a worker that does it; another comes."""
        store = self.cluster.machines[0]
        machines.wait_for(
            lambda: self.goes_on() and f"PUT /made/struck/{written}" in store.log_text(),
            self.cluster.head.log_text,
        )
        at_work = [worker for worker in self.cluster.workers if worker.does(title)]
        assert at_work, f"nobody does {title}:\n{self.cluster.head.log_text()[-3000:]}"
        self.cluster.lose(at_work[0])
        folder = written.partition("/")[0]
        assert f"PUT /made/struck/{folder}/manifest.json" not in store.log_text(), (
            "it was done already"
        )
        self.cluster.join(2)


def test_nodes_that_die_change_no_byte(cluster, tmp_path):
    real_run.make_shards(tmp_path / "shards")
    copy(cluster, "put", str(tmp_path / "shards"), "given/shards")

    driver = Driver(cluster)
    driver.lose_one("MapWorker", "embeddings/")
    driver.lose_one("RayTrainWorker", "network/checkpoint")
    machines.wait_for(lambda: not driver.goes_on(), cluster.head.log_text)
    print(f"a worker killed in embed, one in train: {driver.runs - 1} reruns of the driver")

    assert real_run.wait(run(cluster, "s3://given/shards", "s3://made/calm")) == 0  # as on a laptop
    assert not [
        p
        for p in psutil.process_iter(["cmdline"])
        if f"{cluster.head.folder}/own" in str(p.info["cmdline"])
    ]
    for name in ("struck", "calm"):
        copy(cluster, "get", f"made/{name}", str(tmp_path / name))
    expected = real_run.finals(tmp_path / "calm")
    assert len(expected) > 4 * real_run.SHARDS
    assert real_run.finals(tmp_path / "struck") == expected


def test_what_lies_on_the_disk_of_one_machine_is_refused(cluster, tmp_path):
    private = str(cluster.head.folder) if cluster.namespaces else "/proc/self/cwd"
    shards = tmp_path / "shards"
    real_run.make_shards(shards)
    assert cluster.head.run("cp", "-r", str(shards), f"{private}/shards") == 0
    for given in ((shards, f"{private}/run"), (f"{private}/shards", tmp_path / "run")):
        assert real_run.wait(run(cluster, *map(str, given), cluster.ray_address)) == 2
    message = [line for line in cluster.head.log_text().splitlines() if "do not see" in line]
    addresses = ", ".join(sorted(worker.address for worker in cluster.workers))
    for line, place in zip(message, ("run", "shards/00000.tar"), strict=True):
        assert line.startswith(f"ratecluster: {private}/{place} is on a local disk that")
        assert f"do not see: {addresses}. Put shards" in line
    assert not list(tmp_path.glob("run/.ratecluster-probe-*"))


def test_a_disk_that_all_machines_see_will_do(cluster, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "one.png")
    command = ["shards", "--from", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    to = ["--address", cluster.ray_address]
    assert cluster.head.run(*real_run.RATECLUSTER, *command, *to) == 0, cluster.head.log_text()[
        -3000:
    ]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"00000.tar", "00000.parquet", "00000_stats.json"}
