"""`python -m tests.hub --root DIR`: a hub in a process of its own, for benches.

DIR holds repositories as `org/name/...`. One JSON line on stdout says where the hub is, once every file is hashed;
SIGINT and SIGTERM end it, with another line that says what it sent.
"""

import argparse
import json
import signal
from pathlib import Path

from tests.hub import Hub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub")
    parser.add_argument("--root", type=Path, required=True, help="directory of repositories, as org/name/...")
    parser.add_argument("--rate", type=float, help="bytes per second of the link, shared by all connections")
    parser.add_argument("--latency", type=float, default=0, help="seconds before each response")
    parser.add_argument("--certificate", type=Path, help="with its key: all is https")
    arguments = parser.parse_args()
    ends = {signal.SIGINT, signal.SIGTERM}
    # Before the threads start, so that all of them inherit it and sigwait gets the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    with Hub(certificate=arguments.certificate) as hub:
        hub.shape(arguments.rate, arguments.latency)
        commits = {}
        for directory in sorted(p for p in arguments.root.glob("*/*") if p.is_dir()):
            name = directory.relative_to(arguments.root).as_posix()
            commits[name] = hub.add_repo(name, directory)
            hub.api.repos[name].info(commits[name], blobs=True)  # hashes now what would be hashed when asked
        print(json.dumps({"endpoint": hub.endpoint, "cdn": hub.cdn_endpoint, "repos": commits}), flush=True)
        signal.sigwait(ends)
        print(json.dumps({"requests": len(hub.requests), "sent": hub.sent()}), flush=True)


if __name__ == "__main__":
    main()
