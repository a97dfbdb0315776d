"""The exporter: serves the metrics of a store over HTTP until it is ended."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest, start_http_server

from pipelines.monitor.collector import StoreCollector
from probelog.errors import UsageError
from probelog.storage.store import Store


def metrics_text(uri: str) -> str:
    """The metrics of a store now, as Prometheus reads them."""
    return generate_latest(_registry(uri, 0.0)).decode()


def serve_metrics(uri: str, host: str, port: int, seconds: float) -> None:
    """Serve the metrics of a store until the process is ended.

    Args:
        uri: of the store; it may still be empty.
        host: address to listen on.
        port: to listen on.
        seconds: between two looks at the store.

    Raises:
        UsageError: the address cannot be listened on.
    """
    try:
        _, thread = start_http_server(port, host, _registry(uri, seconds))
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port} ({error}): choose another --port") from None
    thread.join()


def _registry(uri: str, seconds: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    # Described is what it collects: to register it must not wait for the store.
    collector = StoreCollector(Store(uri), seconds)
    collector.describe = list  # type: ignore[attr-defined]
    registry.register(collector)
    return registry
