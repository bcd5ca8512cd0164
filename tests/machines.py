"""Machines of a cluster on this one: network namespaces with an address and a disk each.

Where the right to make namespaces is missing: processes with a loopback address and a folder each.
Of the disks only FOLDER, where a machine keeps all that is its own, is private: the rest is that of
this machine.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos import real_run

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")
ENTER = 'mount --bind "$1" "$2" && cd "$2" && shift 2 && exec "$@"'


@dataclass
class Machine:
    """Where commands run as on a machine of their own."""

    address: str
    folder: Path  # as its own processes see it
    log: Path
    environment: dict[str, str]
    enter: list[str] = field(default_factory=list)  # the command that a command runs under
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """A process of this machine; what it says goes into the log."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*self.enter, *command],
                cwd=None if self.enter else self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def run(self, *command: str) -> int:
        """Its exit code."""
        return real_run.wait(self.start(*command))

    def log_text(self) -> str:
        """By all of its processes."""
        return self.log.read_text(errors="replace")

    def does(self, title: str) -> bool:
        """Whether a worker of Ray with that title runs here."""
        return any(title in name for process in self.started for name in titles(process.pid))

    def die(self) -> None:
        """SIGKILL all that runs."""
        for process in self.started:
            if process.poll() is None:
                real_run.end(process)


@dataclass
class Cluster:
    """A head, workers that come and go, and other machines beside them."""

    namespaces: bool
    folder: Path
    environment: dict[str, str]
    machines: list[Machine] = field(default_factory=list)
    head: Machine | None = None
    workers: list[Machine] = field(default_factory=list)  # that live
    ray_port: int = 0

    @property
    def way(self) -> str:
        """Of keeping machines apart."""
        return "network namespaces" if self.namespaces else "processes with loopback addresses"

    @property
    def ray_address(self) -> str:
        """For --address."""
        assert self.head
        return f"{self.head.address}:{self.ray_port}"

    def add(self) -> Machine:
        """One machine more, on the network of the others."""
        number = len(self.machines) + 1
        disk = self.folder / f"disk{number}"
        (disk / "tmp").mkdir(parents=True)
        name, log = f"{self.folder.name}-{number}", self.folder / f"machine{number}.log"
        if not self.namespaces:
            own = {**self.environment, "TMPDIR": str(disk / "tmp")}
            machine = Machine(f"127.0.0.{number + 1}", disk, log, own)
        else:
            folder, address = self.folder / "disk", f"10.77.0.{number}"
            connect(name, f"{self.folder.name}-1", address)
            own = {**self.environment, "TMPDIR": str(folder / "tmp")}
            # each command has a mount namespace of its own, whose mounts nobody else sees
            enter = ["ip", "netns", "exec", name, "sh", "-c", ENTER, "sh", str(disk), str(folder)]
            machine = Machine(address, folder, log, own, enter)
        self.machines.append(machine)
        return machine

    def join(self, cpus: int) -> Machine:
        """One machine more, and a node of Ray on it; the first is the head."""
        machine = self.add()
        if not self.head:
            self.head = machine
            self.ray_port, agent, client = free_ports(3)
            more = ["--head", f"--port={self.ray_port}", f"--ray-client-server-port={client}"]
            more += ["--include-dashboard=false"]
        else:
            (agent,) = free_ports(1)
            more = [f"--address={self.ray_address}"]
            self.workers.append(machine)
        machine.start(
            *(RAY, "start", "--block", f"--node-ip-address={machine.address}", *more),
            *(f"--num-cpus={cpus}", "--object-store-memory=100000000"),
            *(f"--dashboard-agent-listen-port={agent}", f"--temp-dir={machine.folder}/ray"),
        )
        wait_for(lambda: "Ray runtime started" in machine.log_text(), machine.log_text, 60)
        return machine

    def lose(self, machine: Machine) -> None:
        """A worker dies."""
        self.workers.remove(machine)
        machine.die()

    def end(self) -> None:
        """Kill what runs, remove what was made."""
        for machine in self.machines:
            machine.die()
        if self.namespaces:
            for number in range(len(self.machines)):
                ip("netns", "del", f"{self.folder.name}-{number + 1}")
        shutil.rmtree(self.folder, ignore_errors=True)


def titles(pid: int) -> Iterator[str]:
    """Of the processes of Ray's workers below one."""
    for process in real_run.descendants(pid):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if command and command[0].startswith("ray::"):
            yield command[0]


@contextmanager
def cluster(**environment: str) -> Iterator[Cluster]:
    """An empty cluster of this machine's."""
    folder = Path(tempfile.mkdtemp(prefix="rct", dir="/tmp"))  # short: Ray's sockets lie below it
    (folder / "disk").mkdir()
    whole = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    whole |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", **environment}
    made = Cluster(can_make_namespaces(), folder, whole)
    try:
        yield made
    finally:
        made.end()


def can_make_namespaces() -> bool:
    """Whether a namespace with a bridge can be made here, and a folder be mounted in it."""
    name = f"rct-probe-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    try:
        ip("-n", name, "link", "add", "br0", "type", "bridge")
        ip("netns", "exec", name, "mount", "--bind", "/tmp", "/tmp")
    except subprocess.CalledProcessError:
        return False
    finally:
        ip("netns", "del", name)
    return True


def connect(name: str, first: str, address: str) -> None:
    """A namespace with the address; all hang on a bridge in the first, none on this machine."""
    ip("netns", "add", name)
    ip("-n", name, "link", "set", "lo", "up")
    if name == first:
        ip("-n", name, "link", "add", "eth0", "type", "bridge")
    else:
        port = f"to{address.rpartition('.')[2]}"
        ip(*("-n", name, "link", "add", "eth0", "type", "veth"), *("peer", port, "netns", first))
        ip("-n", first, "link", "set", port, "master", "eth0", "up")
    ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    ip("-n", name, "link", "set", "eth0", "up")
    ip("-n", name, "route", "add", "default", "dev", "eth0")  # Ray takes its address from it


def ip(*words: str) -> None:
    """The command of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(
    condition: Callable[[], object], message: Callable[[], str], limit_s: int = 120
) -> None:
    """Waits until `condition` holds; fails with `message` after `limit_s` seconds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, message()[-5000:]
        time.sleep(0.1)
