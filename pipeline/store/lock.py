"""The lock of a root: one driver at a time.

`{root}/.lock/{generation}.json` names an owner; the highest generation owns the root. Only one
driver can create a file: by O_EXCL on a local disk, by a conditional put on S3 and GCS. On other
stores two drivers may start at the same moment; the one whose name is not in the file stops at the
next heartbeat.

The owner rewrites its file every HEARTBEAT_S. A driver takes over the lock of an ended process of
its own machine at once, and any other lock after STALE_S without a change; no clocks are compared.
An owner that was silent for so long finds a higher generation, and stops; its running tasks still
write their results. Failed heartbeats are repeated for SILENT_S, as long as the store is down.
"""

import errno
import getpass
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec.implementations.local import LocalFileSystem

from pipeline.runtime.errors import UserError
from pipeline.runtime.redaction import redacted
from pipeline.store.retry import retry
from pipeline.store.storage import Folder, locate, read_bytes, write_bytes

log = logging.getLogger(__name__)
HEARTBEAT_S = 10.0
LAST_BEAT_S = 10.0  # longest wait for a running heartbeat at the end
STALE_S = 60.0  # without a change, after which another machine's lock may be taken over
SILENT_S = 600.0  # without a written heartbeat, after which an owner stops
FILE = re.compile(r"(\d+)\.json")

# Of an owner; {"released": True}; or empty where the file is not complete yet.
Facts = dict[str, Any]


def read(root: str) -> tuple[int, Facts]:
    """The highest generation and the facts in its file; (0, released) without one."""
    while found := [int(m[1]) for n in _folder(root).names() if (m := FILE.fullmatch(n))]:
        number = max(found)
        if (facts := _facts(_url(root, number))) is not None:
            return number, facts
    return 0, {"released": True}  # a listed file may be gone by now


def lives(facts: Facts) -> bool | None:
    """Whether the process of the owner runs; None on another machine."""
    here = (socket.gethostname(), _machine())
    if not here[1] or here != (facts.get("host"), facts.get("machine")):
        return None
    return _born(int(facts["pid"])) == facts["born"]


def describe(facts: Facts) -> str:
    """The owner, its start and its current stage, for a message."""
    if not facts:
        return "a driver that is just starting"
    if "owner" not in facts:
        return "a driver that has just ended"
    doing = (facts["doing"] or {}).get("line", "no stage yet")
    return (
        f"{facts['user']} on {facts['host']} (process {facts['pid']}, {facts['command']}) since "
        f"{facts['since']}, {doing}"
    )


@contextmanager
def acquire(
    root: str, doing: Callable[[], Facts | None], lost: Callable[[str], None]
) -> Iterator[None]:
    """Own the root while the block runs; UserError if another driver owns it.

    `doing` returns the current stage, for the heartbeat. `lost` is called with the reason, from
    another thread and at every heartbeat, once another driver owns the root.
    """
    owner = _take(root)
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(owner, doing, lost, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LAST_BEAT_S)
        owner.keep |= thread.is_alive()  # its thread may still write the file
        try:
            owner.release()
        except Exception as error:  # the work is done; the next driver takes over
            log.warning("%s: the lock cannot be released: %s", root, error)


@dataclass
class Owner:
    """This process as the owner of a root."""

    root: str
    generation: int
    facts: Facts
    keep: bool  # leave the number: the previous owner may resume and must see a higher one
    made: list[Path]  # folders to remove at the end if they are empty, the deepest first

    def beat(self, doing: Facts | None) -> str:
        """Write a heartbeat; returns why this process no longer owns the root, or ""."""
        number, facts = read(self.root)
        if number == self.generation and not facts:
            raise OSError(f"{_url(self.root, number)} was not read completely")
        if number < self.generation:
            return f"the lock of {self.root} was removed while this command ran: stopping"
        if not _same((number, facts), (self.generation, self.facts)):
            return (
                f"{self.root} was taken over by {describe(facts)}, because this command wrote no "
                f"heartbeat for more than {STALE_S:g} s. It stops, so that only one command writes"
            )
        self.facts |= {"beat": self.facts["beat"] + 1, "at": _now(), "doing": doing}
        write_bytes(_url(self.root, self.generation), _json(self.facts))
        return ""

    def release(self) -> None:
        """Remove the file, or keep only its number; no effect after a takeover."""
        number, facts = read(self.root)
        if not _same((number, facts), (self.generation, self.facts)):
            return
        folder, name = _folder(self.root), f"{number:08d}.json"
        old = {n for n in folder.names() if FILE.fullmatch(n) and n <= name}
        if self.keep:
            write_bytes(folder.file(name), _json({"released": True}))
            old -= {name}
        folder.remove(old)
        with suppress(OSError):
            for made in self.made:
                made.rmdir()


def _keep(
    owner: Owner,
    doing: Callable[[], Facts | None],
    lost: Callable[[str], None],
    over: threading.Event,
) -> None:
    """Write heartbeats until `over`."""
    silent, good = False, time.monotonic()
    while not over.wait(HEARTBEAT_S):
        try:
            reason = owner.beat(doing())
        except Exception as error:  # of the store
            if not silent:
                log.warning("%s: cannot write a heartbeat, retrying: %s", owner.root, error)
            silent = True
            if time.monotonic() - good > SILENT_S:
                lost(
                    f"{owner.root}: no heartbeat could be written for {SILENT_S:g} s ({error}), so "
                    "another driver may have started: run the same command again"
                )
            continue
        silent, good = False, time.monotonic()
        if reason:
            lost(reason)


def _take(root: str) -> Owner:
    watched: tuple[int, Facts] | None = None
    while True:
        before = number, facts = read(root)
        free = facts.get("released", False)
        alive = False if free else lives(facts)
        if alive is None and watched and _same(watched, before):
            alive = True  # its file changed
        if alive:
            raise UserError(
                f"{root} is in use by {describe(facts)}. Wait until it ends, stop it, or choose "
                "another --root"
            )
        if alive is None and _changes(root, before):
            watched = before
            continue
        keep = number > 0 and (free or alive is None)
        owner = Owner(root, number + 1, _process(), keep, _missing(root))
        if not _create(_url(root, number + 1), owner.facts):
            continue
        if not free:
            left = _facts(_url(root, number)) or {}
            if left.get("owner") != facts.get("owner"):  # its owner ended in the meantime
                _folder(root).remove({f"{number + 1:08d}.json"})
                continue
            log.warning(
                "%s: took over the lock of %s, whose process has ended", root, describe(facts)
            )
        return owner


def _same(one: tuple[int, Facts], other: tuple[int, Facts]) -> bool:
    return (one[0], one[1].get("owner")) == (other[0], other[1].get("owner"))


def _changes(root: str, before: tuple[int, Facts]) -> bool:
    """Whether the newest file changes, or a newer one comes, within STALE_S."""
    log.warning(
        "%s is in use by %s; waiting up to %g s for its next heartbeat",
        *(root, describe(before[1]), STALE_S),
    )
    end = time.monotonic() + STALE_S
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE_S / 4))
        if read(root) != before:
            return True
    return False


def _create(url: str, facts: Facts) -> bool:
    """Create the file unless it exists; returns whether it is ours."""
    fs, path = locate(url)
    try:
        if isinstance(fs, LocalFileSystem):
            _create_local(Path(path), _json(facts))
        else:
            retry(lambda: fs.pipe_file(path, _json(facts), mode="create"))
    except Exception as error:
        absent = _facts(url) is None
        if getattr(error, "errno", None) == errno.ENOSYS and absent:
            log.warning("%s: this store has no exclusive create: start one driver at a time", url)
            write_bytes(url, _json(facts))
        elif absent and not isinstance(error, (FileNotFoundError, FileExistsError)):
            raise
    return (_facts(url) or {}).get("owner") == facts["owner"]


def _create_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
        except OSError:  # a full disk
            path.unlink()
            raise


def _missing(root: str) -> list[Path]:
    """The folder of the lock, and those of its parents that do not exist yet."""
    fs, path = locate(_folder(root).url)
    if not isinstance(fs, LocalFileSystem):
        return []
    return [Path(path), *(folder for folder in Path(path).parents if not folder.exists())]


def _folder(root: str) -> Folder:
    return Folder(f"{root.rstrip('/')}/.lock")


def _url(root: str, number: int) -> str:
    return _folder(root).file(f"{number:08d}.json")


def _facts(url: str) -> Facts | None:
    """The facts in a file; empty where it is not complete yet, None without the file."""
    try:
        return dict(json.loads(read_bytes(url)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {}


def _json(facts: Facts) -> bytes:
    return json.dumps(facts, indent=1, ensure_ascii=False).encode()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(" ", "seconds")


def _process() -> Facts:
    """What identifies this process."""
    command = redacted(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user in a container
        user = f"user {os.getuid()}"
    return {
        "owner": uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "born": _born(os.getpid()),
        "user": user,
        "command": command,
        "since": _now(),
        "beat": 0,
        "at": _now(),
        "doing": None,
    }


def _machine() -> str:
    """The boot and the namespace in which a process id is unique; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """The start of a process of this machine, in ticks after the boot; "" if it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in ("Z", "X") else rest[18]
