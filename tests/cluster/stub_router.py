"""A router process that only answers /ready, for tests of what keeps it running: 503 while there
is a file `alone` in the run's folder.

Told to stop it closes its port, and stays as long as there is a file `drains` in the run's folder.
"""

import argparse
import http.server
import os
import signal
import socket
import sys
import time
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if Path(sys.argv[2], "alone").exists() else 200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    arguments = parser.parse_args()
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=arguments.listen_fd)

    def stop(*_: object) -> None:
        server.socket.close()
        while (Path(arguments.run_dir) / "drains").exists():
            time.sleep(0.01)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    server.serve_forever()


if __name__ == "__main__":
    main()
