"""Generates wire/ from proto/wire/*.proto, or checks that wire/ is what proto/ generates.

    python tools/proto.py generate    rewrite the generated modules in wire/
    python tools/proto.py check       exit 1 and name each file that is stale, missing or left over

The generated text depends on the version of grpcio-tools, which the test extras pin.
"""

import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
WIRE = ROOT / "wire"


def main(arguments: list[str]) -> int:
    """Run one command; the answer is the exit status."""
    if arguments == ["generate"]:
        return generate()
    if arguments == ["check"]:
        return check()
    print("usage: python tools/proto.py generate|check", file=sys.stderr)
    return 2


def generate() -> int:
    """Write the generated modules and remove those whose .proto is gone."""
    fresh, present = _generated(), _present()
    for name in present.keys() - fresh.keys():
        (WIRE / name).unlink()
    for name, text in fresh.items():
        if present.get(name) != text:
            (WIRE / name).write_text(text)
    print(f"wire/: {len(fresh)} files generated")
    return 0


def check() -> int:
    """Compare without writing; 0 when wire/ is up to date."""
    fresh, present = _generated(), _present()
    stale = [
        name
        for name in sorted(fresh.keys() | present.keys())
        if fresh.get(name) != present.get(name)
    ]
    for name in stale:
        state = (
            "is left over" if name not in fresh else "is stale" if name in present else "is missing"
        )
        print(f"wire/{name} {state}: run `python tools/proto.py generate`", file=sys.stderr)
    return 1 if stale else 0


def _generated() -> dict[str, str]:
    sources = sorted(str(path.relative_to(PROTO)) for path in (PROTO / "wire").glob("*.proto"))
    with TemporaryDirectory(prefix="baton-proto-") as folder:
        code = protoc.main(
            [
                "protoc",
                f"-I{PROTO}",
                f"-I{files('grpc_tools') / '_proto'}",
                f"--python_out={folder}",
                f"--pyi_out={folder}",
                f"--grpc_python_out={folder}",
                *sources,
            ]
        )
        if code != 0:
            raise SystemExit(f"protoc failed on proto/wire with status {code}")
        return {path.name: path.read_text() for path in (Path(folder) / "wire").iterdir()}


def _present() -> dict[str, str]:
    return {path.name: path.read_text() for path in WIRE.glob("*_pb2*.py*")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
