"""`python -m benchmarks.router.peers.install [NAME ...]`, which `make peers` runs.

Each peer gets an environment of its own. One that cannot be installed is named with the next step,
and the others go on; the exit status says whether any is missing.
"""

import subprocess
import sys

from benchmarks.router.peers.catalog import HOME, Install, Peer, catalog

_TIMEOUT_S = 600.0
_LEFT_OUT = "vLLM's CPU build is an engine of 3.5 GB, no router: it is left out"


class InstallFailed(Exception):
    """The command that failed, and the last thing it said."""


def install(peer: Peer) -> None:
    """Raises InstallFailed. What stands already is left as it is."""
    if peer.installed:
        return
    _run(sys.executable, "-m", "venv", "--clear", str(peer.home))
    for step in peer.installs:
        _run(*pip_command(peer, step))
    peer.mark.touch()


def pip_command(peer: Peer, step: Install) -> list[str]:
    """One call of the environment's own pip."""
    pip = [str(peer.path("python")), "-m", "pip", "install", "--quiet"]
    return [*pip, "--disable-pip-version-check", *["--no-deps"] * step.no_deps, *step.packages]


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise InstallFailed(f"no end after {_TIMEOUT_S:g} s: {' '.join(command)}") from None
    except subprocess.CalledProcessError as error:
        said = [line for line in f"{error.stdout}\n{error.stderr}".splitlines() if line.strip()]
        last = said[-1].strip() if said else f"status {error.returncode}"
        raise InstallFailed(f"{last}; to see all of it: {' '.join(command)}") from None
    except OSError as error:
        raise InstallFailed(str(error)) from None


def main() -> None:
    HOME.mkdir(exist_ok=True)
    names, failed = sys.argv[1:], False
    for peer in catalog():
        if names and peer.name not in names:
            continue
        title = f"{peer.name} {peer.version}"
        print(f"{title}: {'is there' if peer.installed else 'installing'}", flush=True)
        try:
            install(peer)
        except InstallFailed as error:
            failed = True
            print(f"{title}: not installed: {error}", file=sys.stderr, flush=True)
    print(_LEFT_OUT)
    sys.exit(failed)


if __name__ == "__main__":
    main()
