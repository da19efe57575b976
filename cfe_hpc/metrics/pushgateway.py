"""Pushes a run's newest values to a Prometheus Pushgateway, from a thread that training never waits for.

A gateway keeps what it is given for ever, so one group stands for the whole run (job="cfe_hpc", run_id): every
attempt writes over what the one before left behind, even when that was killed, and each deletes the group as it ends.
"""

from __future__ import annotations

import atexit
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from urllib.error import HTTPError

from prometheus_client import CollectorRegistry, delete_from_gateway, push_to_gateway
from prometheus_client.exposition import basic_auth_handler, default_handler

from cfe_hpc.errors import ConfigError
from cfe_hpc.metrics.gateway import Credentials, check_url, read_credentials
from cfe_hpc.metrics.snapshot import Snapshot

__all__ = ["JOB", "PushgatewayExporter", "delete_group"]

logger = logging.getLogger(__name__)

JOB = "cfe_hpc"
"""The `job` label of every group."""

_INTERVAL_S = 1.0
_PUSH_TIMEOUT_S = 3.0
_BACKOFF_FIRST_S = 1.0
_BACKOFF_MAX_S = 60.0
_DELETE_RETRY_S = 0.2
# At the interpreter's end, for runs that died before they could close.
_EXIT_TIMEOUT_S = 2.0


class PushgatewayExporter:
    """Keeps the newest values only; a slow gateway gets fewer pushes, not older ones. See metrics.exporter.Exporter."""

    def __init__(
        self,
        url: str,
        snapshot: Snapshot,
        *,
        run_id: str,
        interval_s: float = _INTERVAL_S,
        push_timeout_s: float = _PUSH_TIMEOUT_S,
        credentials: Credentials | None = None,
    ) -> None:
        """Start the thread; the first push goes out with the first values.

        Args:
            interval_s: seconds from one push to the next, at the least.
            push_timeout_s: seconds until a push that gets no answer is given up.
            credentials: the environment's when None.

        Raises:
            ConfigError: the URL holds a password or is none; the environment's credentials are incomplete.
        """
        problem = check_url(url)
        if problem:
            raise ConfigError([problem])
        self._url, self._run_id, self._snapshot = url, run_id, snapshot
        self._interval_s, self._push_timeout_s = interval_s, push_timeout_s
        self._handler = _handler(credentials or read_credentials())
        self._registry = CollectorRegistry()
        self._registry.register(snapshot)
        self._news = threading.Event()
        self._closing = threading.Event()
        self._deadline_s = float("inf")
        self._failing = False
        self._may_have_group = False
        self._thread = threading.Thread(target=self._serve, name="cfe-pushgateway", daemon=True)
        self._thread.start()
        atexit.register(self.close, _EXIT_TIMEOUT_S)

    def publish(self, values: Mapping[str, float], *, step: int) -> None:
        self._snapshot.update(values, step=step)
        self._news.set()

    def close(self, timeout_s: float) -> None:
        if self._closing.is_set():
            return
        self._deadline_s = time.monotonic() + timeout_s
        self._closing.set()
        self._news.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive() or self._may_have_group:
            logger.warning("the Pushgateway gave no answer; it may still hold the group of %s", self._run_id)
        atexit.unregister(self.close)

    def _serve(self) -> None:
        """The thread: push while there is news, wait between pushes, and delete the group at the end."""
        backoff_s = 0.0
        while True:
            self._news.wait()
            if self._closing.is_set():
                break
            self._news.clear()
            if self._push():
                backoff_s = 0.0
            else:
                self._news.set()
                backoff_s = min(_BACKOFF_MAX_S, max(_BACKOFF_FIRST_S, 2.0 * backoff_s))
            # Jitter: a thousand runs must not find the gateway back at the same moment.
            self._closing.wait(max(self._interval_s, backoff_s * random.uniform(0.5, 1.0)))
        if self._may_have_group:
            self._delete()

    def _push(self) -> bool:
        # Set before the call: a push that times out here may still arrive there.
        self._may_have_group = True
        return self._attempt(
            partial(
                push_to_gateway,
                self._url,
                JOB,
                self._registry,
                {"run_id": self._run_id},
                timeout=self._push_timeout_s,
                handler=self._handler,
            )
        )

    def _delete(self) -> None:
        """Delete the group, again and again until the gateway says yes or the time given to `close` is over.

        Tried once at least: a process that lives on after `close` has given up still gets it done.
        """
        while True:
            left_s = self._deadline_s - time.monotonic()
            timeout_s = min(max(left_s, self._interval_s), self._push_timeout_s)
            if self._attempt(partial(_delete, self._url, self._run_id, timeout_s, self._handler)):
                self._may_have_group = False
                return
            if left_s <= _DELETE_RETRY_S:
                return
            time.sleep(_DELETE_RETRY_S)

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Whether the call went well. Logs the first failure of a row, and the first success after it."""
        try:
            call()
        except Exception as error:  # whatever a gateway, a proxy or a resolver does: training goes on
            if isinstance(error, HTTPError):
                error.close()
            if not self._failing:
                self._failing = True
                logger.warning("cannot reach the Pushgateway (%s); trying again in the background", error)
            return False
        if self._failing:
            self._failing = False
            logger.info("the Pushgateway answers again")
        return True


def delete_group(url: str, run_id: str, *, timeout_s: float) -> None:
    """Delete a run's group for a run that could not do it itself; one that is not there counts as deleted.

    Raises:
        ConfigError: the URL or the environment's credentials are wrong.
        OSError: the gateway did not do it.
    """
    problem = check_url(url)
    if problem:
        raise ConfigError([problem])
    try:
        _delete(url, run_id, timeout_s, _handler(read_credentials()))
    except HTTPError as error:
        error.close()
        raise


def _delete(url: str, run_id: str, timeout_s: float, handler: Callable[..., Callable[[], None]]) -> None:
    delete_from_gateway(url, JOB, {"run_id": run_id}, timeout=timeout_s, handler=handler)


def _handler(credentials: Credentials | None) -> Callable[..., Callable[[], None]]:
    if credentials is None:
        return default_handler
    known = credentials

    def handler(
        url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        return basic_auth_handler(url, method, timeout, headers, data, known.user, known.password)

    return handler
