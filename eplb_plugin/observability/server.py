"""The port on which Prometheus reads the series of a process."""

from __future__ import annotations

from ..config.options import MetricsOptions
from ..core.errors import ConfigError
from ..runtime.rebalancer import Rebalancer
from .prometheus import Telemetry

__all__ = ["MetricsServer", "serve_metrics"]


class MetricsServer:
    """Answers HTTP requests for the series of this process, in a thread of its own.

    Args:
        options: where; port 0 takes one that is free.

    Attributes:
        port: where it answers.
        telemetry: the series, for models that are to show beside the first one.

    Raises:
        ConfigError: the port cannot be had on the host.
    """

    def __init__(self, options: MetricsOptions) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        self.telemetry = Telemetry(registry)
        try:
            self._server, self._thread = start_http_server(options.port, options.host, registry)
        except OSError as error:
            raise ConfigError(
                f"metrics.port={options.port} on metrics.host={options.host}: cannot be listened on: {error}"
            ) from None
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(
    rebalancer: Rebalancer, options: MetricsOptions, *, model: str = "model"
) -> MetricsServer | None:
    """Show what a rebalancer does on a port of its first rank. Any rank may call it, or all of them.

    Args:
        rebalancer: gets the model's series as its `observer`.
        options: whether and where.
        model: value of the label `model_name`.

    Returns:
        The server; None on other ranks, and where metrics are not enabled.

    Raises:
        ConfigError: the port cannot be had on the host.
    """
    if not options.enabled or rebalancer.rank != 0:
        return None
    server = MetricsServer(options)
    telemetry = server.telemetry.of(model)
    for cause in rebalancer.warnings.elements():  # from the start, before anyone observed
        telemetry.warned(cause)
    rebalancer.observer = telemetry
    return server
