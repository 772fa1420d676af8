"""One folder per run, named by user and run, that holds all a cluster leaves on the machine.

    <tmp>/baton-<user>/<run_id>/     0700, removed at exit
        run.json                     who runs: pid and start time of the controller, addresses
        config.json                  the settings of this run, as the router reads them
        deaths.json                  how often each worker died, and why the last time
        logs/<process>.log           one per worker, router and controller
        ray/                         Ray's own session
        ray_token                    Ray's password for this run
        registry.sock                who is there, served by the controller
    /dev/shm/baton-<user>-<run_id>/  shared memory of Ray and UCX, removed with the rest

Every process of a run carries BATON_RUN_DIR in its environment; sweep.py ends orphans by it.
"""

import json
import os
import pwd
import secrets
import shutil
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from core.errors import ConfigError, plain

RUN_DIR_VARIABLE = "BATON_RUN_DIR"

_SOCKET_PATH_BYTES = 103  # sockaddr_un holds 104 bytes on macOS and 108 on Linux, with the zero
_USER_BYTES = 15
_LONGEST_INSIDE = "/00000000/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_SHARED_MEMORY = Path("/dev/shm")
_RUN_LINK = "run"
_SAME_START_S = 0.1
_CLOCK_S = 2.0
"""Times of processes are in whole seconds after a boot in whole seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What run.json says. Addresses are empty until they are known."""

    run_id: str
    pid: int
    booted_s: float
    """Start of process `pid` as the kernel tells it: another process of that pid has another. On
    Linux it counts from the boot, so that a step of the clock changes nothing.
    """
    model: str
    registry_address: str = ""
    router_url: str = ""

    def controller_lives(self) -> bool:
        """The process that made the run still exists, and not only its pid."""
        try:
            return abs(_start_of(self.pid) - self.booted_s) < _SAME_START_S
        except psutil.Error:
            return False


class RunDir:
    """The folder of one run, from `create` to `remove`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_id = path.name

    @classmethod
    def create(cls, root: Path, model: str) -> "RunDir":
        """Make the folder of a new run of this process. Raises ConfigError."""
        run_id = secrets.token_hex(4)
        # Under its final name a folder always has a run.json, so a sweep never takes a new one.
        new, run = root / f".{run_id}", cls(root / run_id)
        try:
            run._make(new, model)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            run.remove()
            raise ConfigError(
                f"{error.filename or root} cannot be written: {plain(error)}; make room, or set"
                " TMPDIR to another folder"
            ) from error
        return run

    def _make(self, new: Path, model: str) -> None:
        root = self.path.parent
        _make_root(root)
        try:
            new.mkdir(mode=0o700)
        except FileNotFoundError:  # the last run of another process just removed the root
            _make_root(root)
            new.mkdir(mode=0o700)
        for folder in (new / "logs", new / "ray"):
            folder.mkdir(mode=0o700)
        info = RunInfo(
            run_id=self.run_id, pid=os.getpid(), booted_s=_start_of(os.getpid()), model=model
        )
        _write(new / "run.json", json.dumps(asdict(info)))
        _write(new / "ray_token", secrets.token_hex(32))
        new.rename(self.path)
        self.shm.mkdir(mode=0o700)
        (self.shm / _RUN_LINK).symlink_to(self.path)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    @property
    def ray_token(self) -> Path:
        return self.path / "ray_token"

    @property
    def deaths(self) -> Path:
        """Not there before a worker died."""
        return self.path / "deaths.json"

    @property
    def registry_address(self) -> str:
        """A socket in the folder: nobody but the user can register or watch workers."""
        return f"unix:{self.path / 'registry.sock'}"

    @property
    def shm(self) -> Path:
        """Backed by memory where the system has such a place."""
        if _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK):
            return _SHARED_MEMORY / f"{self.path.parent.name}-{self.run_id}"
        return self.path / "shm"

    def log_path(self, process: str) -> Path:
        """Where the process of that name, a worker_id or `router`, writes."""
        return self.logs / f"{process}.log"

    def info(self) -> RunInfo:
        """Raises OSError or ValueError when run.json is gone or not ours."""
        fields = json.loads((self.path / "run.json").read_text())
        try:
            return RunInfo(**fields)
        except TypeError as error:
            raise ValueError(f"{self.path / 'run.json'} is of another version") from error

    def update(self, *, router_url: str) -> None:
        """Tell the addresses to `baton status`, the router and the workers."""
        info = replace(self.info(), registry_address=self.registry_address, router_url=router_url)
        _write(self.path / "run.json", json.dumps(asdict(info)))

    def write_config(self, config_json: str) -> None:
        """Keep the settings of this run; they may hold API keys, so only the user reads them."""
        _write(self.path / "config.json", config_json)

    def write_deaths(self, deaths_json: str) -> None:
        """What deaths.py keeps."""
        _write(self.deaths, deaths_json)

    def is_alive(self) -> bool:
        """The controller that made the folder still runs."""
        try:
            return self.info().controller_lives()
        except OSError:
            return False
        except ValueError:
            return self._lives_in_another_version()

    def _lives_in_another_version(self) -> bool:
        """All have the pid, of a process that began before the file was written."""
        try:
            file = self.path / "run.json"
            process = psutil.Process(int(json.loads(file.read_text())["pid"]))
            began_before = process.create_time() <= file.stat().st_mtime + _CLOCK_S
            return began_before and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return False

    def remove(self) -> None:
        """Remove the folder and the shared memory; what is gone already is fine."""
        shutil.rmtree(self.shm, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            self.path.parent.rmdir()
        except OSError:
            return  # another run lives there


def runs_root(temporary: Path | None = None, user: str | None = None) -> Path:
    """The folder of this user's runs, below the system's temporary folder or else below /tmp.

    Raises ConfigError when neither is short enough for the sockets of Ray.
    """
    first = temporary or _temporary()
    name = f"baton-{_folder_name(user or _user())}"
    for place in (first, Path("/tmp")):
        root = place / name
        if len(os.fsencode(f"{root}{_LONGEST_INSIDE}")) <= _SOCKET_PATH_BYTES:
            return root
    raise ConfigError(
        f"the path {first / name} is too long for the sockets of Ray:"
        " set TMPDIR to a shorter folder"
    )


def all_runs(root: Path) -> list[RunDir]:
    """Every run folder, alive or dead; none when the root does not exist."""
    try:
        return [RunDir(path) for path in sorted(root.iterdir()) if not path.name.startswith(".")]
    except FileNotFoundError:
        return []


def live_runs(root: Path) -> list[RunDir]:
    """The runs whose controller is alive."""
    return [run for run in all_runs(root) if run.is_alive()]


def orphaned_memory(root: Path) -> list[Path]:
    """Shared memory whose run folder was removed by somebody else, such as a cleaner of /tmp."""
    return [
        memory
        for memory in _SHARED_MEMORY.glob(f"{root.name}-*")
        if (memory / _RUN_LINK).is_symlink() and not (memory / _RUN_LINK).exists()
    ]


def _temporary() -> Path:
    """Where `tempfile` looks first. When that is full it goes elsewhere, and so commands would not
    find the clusters that run there.
    """
    named = filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP")))
    return Path(next(named, "/tmp")).absolute()


def _make_root(root: Path) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(f"{root} belongs to another user: remove it, or set TMPDIR")
    root.chmod(0o700)


def _write(path: Path, text: str) -> None:
    """Replace in one step, readable by the user alone."""
    new = path.with_name(f".{path.name}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    new.replace(path)


def _start_of(pid: int) -> float:
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.ZombieProcess(pid)
    started_s = process.create_time()
    return started_s - psutil.boot_time() if psutil.LINUX else started_s


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


def _folder_name(user: str) -> str:
    plain = "".join(letter if letter.isalnum() else "_" for letter in user)
    return plain if 0 < len(os.fsencode(plain)) <= _USER_BYTES else f"uid{os.getuid()}"
