"""`baton up --json` with one worker of each role and small parts: `small_up.py HOST [PORT]`."""

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
            "router.port": int(sys.argv[2]) if len(sys.argv) > 2 else 0,
            "drain_timeout_s": 1.0,
        },
    )
    parts = Parts(worker_host=f"hosts:{sys.argv[1]}", router_module="stub_router", checks=False)
    try:
        run_up(config, as_json=True, parts=parts)
    except BatonError as error:
        sys.exit(error.message)
