"""`baton up --json` with small parts, a worker of each role: `small_up.py HOST [KEY=VALUE ...]`."""

import sys
from pathlib import Path

from cluster.config_file import load_config
from cluster.controller import Parts
from cluster.up import run_up
from core.errors import BatonError

if __name__ == "__main__":
    config = load_config(
        None,
        {
            "model.path": Path("/nowhere/tiny"),
            "prefill.workers": 1,
            "decode.workers": 1,
            "router.port": 0,
            "drain_timeout_s": 1.0,
            **dict(argument.split("=") for argument in sys.argv[2:]),
        },
    )
    parts = Parts(worker_host=f"hosts:{sys.argv[1]}", router_module="stub_router", checks=False)
    try:
        run_up(config, as_json=True, parts=parts)
    except BatonError as error:
        sys.exit(error.message)
