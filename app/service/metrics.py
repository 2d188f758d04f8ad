"""Figures for Prometheus, and one plain log line a request. No prompt, token or session is ever in either."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from app.errors import UserError
from app.service.faults import sentence_of

log = logging.getLogger("modification.app")
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Counts of one app; ``gauges`` are read when somebody asks: name, what it says, how to read it."""

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "mod_requests", "Requests by kind and how they ended: done, refused, failed, left.", ["kind", "outcome"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "mod_request_seconds", "Seconds from a request to its end, waiting included.", ["kind"],
            buckets=_SECONDS, registry=self.registry,
        )
        self.tokens = Counter("mod_tokens", "New tokens made.", registry=self.registry)
        self._pairs = Counter(
            "mod_layer_tokens", "(MoD layer, token) pairs, by whether they ran: their share is the load.", ["ran"],
            registry=self.registry,
        )
        self.refusals = Counter("mod_http_refused", "HTTP requests that were refused.", ["why"], registry=self.registry)
        for name, (says, read) in gauges.items():
            Gauge(name, says, registry=self.registry).set_function(read)

    def routed(self, tokens: int, ran: int, scored: int) -> None:
        """Count a run's new tokens, and its pairs that ran and were scored."""
        self.tokens.inc(tokens)
        self._pairs.labels("yes").inc(ran)
        self._pairs.labels("no").inc(scored - ran)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return bytes(generate_latest(self.registry))

    @contextlib.contextmanager
    def request(self, kind: str) -> Iterator[None]:
        """Count a request and log how it ended, under an id of its own."""
        name, began, outcome = secrets.token_hex(4), time.monotonic(), "done"
        log.info("request %s %s began", name, kind)
        try:
            yield
        except GeneratorExit:
            outcome = "left"
            raise
        except BaseException as error:  # panics of libraries in Rust are no Exceptions
            foreseen = isinstance(error, UserError)
            outcome = "refused" if foreseen else "failed"
            if not foreseen:
                log.warning("request %s %s: %s", name, kind, sentence_of(error) or type(error).__name__)
            raise
        finally:
            seconds = time.monotonic() - began
            self._requests.labels(kind, outcome).inc()
            self._seconds.labels(kind).observe(seconds)
            log.info("request %s %s %s after %.2f s", name, kind, outcome, seconds)
