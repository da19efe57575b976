"""What a step pays for metrics: the time of publish() with the gateway up, down, slow, or answering 500, against none.

Run it: python tests/benchmarks/bench_exporter.py [--json] [--steps N] [--step-ms MS]. Needs prometheus-pushgateway.

Each round times every case once, in an order that changes from round to round; shown are medians over the rounds.
A step is a fixed piece of work for the interpreter, so that the exporter's thread competes for it as it would with a
training loop; `publish_us` is the call alone, `step_ratio` is a step's time with the exporter ÷ without.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import logging
import random
import shutil
import socket
import statistics
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from cfe_hpc.metrics.exporter import Exporter, NullExporter
from cfe_hpc.metrics.pushgateway import PushgatewayExporter
from cfe_hpc.metrics.snapshot import Snapshot

VALUES = {"loss": 2.5, "step_seconds": 0.1, "tokens_per_second": 1e5, "lr": 3e-4, "grad_norm": 1.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def gateway_up() -> Iterator[str]:
    program = shutil.which("prometheus-pushgateway")
    if program is None:
        raise SystemExit("prometheus-pushgateway is not installed")
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [program, f"--web.listen-address={address}", "--persistence.file="],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
                break
            time.sleep(0.05)
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def gateway_down() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextlib.contextmanager
def gateway_slow() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def gateway_500() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_error(500)

        do_PUT = do_DELETE = answer

        def log_message(self, *args: object) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def work(iterations: int) -> float:
    total = 0.0
    for index in range(iterations):
        total += index * 0.5
    return total


def calibrate(step_ms: float) -> int:
    """Iterations of `work` that take about `step_ms`."""
    started = time.perf_counter()
    work(200_000)
    return max(1, int(200_000 * step_ms / 1000 / (time.perf_counter() - started)))


def measure(exporter: Exporter, steps: int, iterations: int) -> tuple[float, float]:
    """(median seconds of a publish, mean seconds of a step)."""
    publishing = []
    started = time.perf_counter()
    for step in range(steps):
        work(iterations)
        before = time.perf_counter()
        exporter.publish(VALUES, step=step)
        publishing.append(time.perf_counter() - before)
    return statistics.median(publishing), (time.perf_counter() - started) / steps


GATEWAYS: dict[str, Callable[[], contextlib.AbstractContextManager[str]]] = {
    "up": gateway_up,
    "down": gateway_down,
    "slow": gateway_slow,
    "500": gateway_500,
}


def run(rounds: int, steps: int, step_ms: float) -> dict[str, Any]:
    iterations = calibrate(step_ms)
    publish_s: dict[str, list[float]] = {name: [] for name in ("none", *GATEWAYS)}
    step_s: dict[str, list[float]] = {name: [] for name in publish_s}
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(gateway()) for name, gateway in GATEWAYS.items()}
        for number in range(rounds):
            for name in random.Random(number).sample(sorted(publish_s), len(publish_s)):
                exporter: Exporter = NullExporter()
                if name in urls:
                    snapshot = Snapshot(run_id=f"bench-{number}", job_name="bench", attempt=0)
                    exporter = PushgatewayExporter(urls[name], snapshot, run_id=f"bench-{number}")
                published, stepped = measure(exporter, steps, iterations)
                exporter.close(0.2)
                publish_s[name].append(published)
                step_s[name].append(stepped)
    base = statistics.median(step_s["none"])
    return {
        "rounds": rounds,
        "steps": steps,
        "cases": {
            name: {
                "publish_us": round(1e6 * statistics.median(publish_s[name]), 2),
                "step_ms": round(1e3 * statistics.median(step_s[name]), 4),
                "step_ratio": round(statistics.median(step_s[name]) / base, 4),
            }
            for name in publish_s
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-ms", type=float, default=5.0)
    args = parser.parse_args()
    logging.getLogger("cfe_hpc").addHandler(logging.NullHandler())
    logging.getLogger("cfe_hpc").propagate = False
    results = run(args.rounds, args.steps, args.step_ms)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{'gateway':<8} {'publish us':>11} {'step ms':>9} {'ratio to none':>14}")
    for name, case in results["cases"].items():
        print(f"{name:<8} {case['publish_us']:>11.2f} {case['step_ms']:>9.3f} {case['step_ratio']:>14.4f}")


if __name__ == "__main__":
    main()
