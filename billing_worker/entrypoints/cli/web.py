from __future__ import annotations

import click
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]

from billing_worker import config, logs
from billing_worker.entrypoints.cli.shared import settings_for
from billing_worker.entrypoints.cli.vault_keys import require_keys_if_known
from billing_worker.entrypoints.web.app import create_app


@click.command()
@click.option(
    "--host",
    default="0.0.0.0",  # noqa: S104 - in a container
    show_default=True,
    help="Address to listen on.",
)
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="TCP port."
)
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes."
)
def web(host: str, port: int, workers: int) -> None:
    """Serve callbacks, pay pages and health checks under gunicorn, behind your own TLS proxy.

    POST /callbacks/payment-invoices is for the gateway (BILLING_CALLBACK_SECRET enables it), /pay/…
    for customers, /health/live and /health/ready for a process supervisor.

    \b
    Example:
      billing-worker web --port 8000 --workers 2
    """
    settings = settings_for(*config.WEB)
    require_keys_if_known(settings)
    logs.configure()

    class Server(BaseApplication):  # type: ignore[misc] # gunicorn ships no types
        def load_config(self) -> None:
            self.cfg.set("bind", f"{host}:{port}")
            self.cfg.set("workers", workers)
            self.cfg.set("threads", 8)
            self.cfg.set("timeout", 30)
            # With its heartbeat file on a busy disk gunicorn kills healthy workers.
            self.cfg.set("worker_tmp_dir", None)

        def load(self) -> object:
            return create_app(settings)

    Server().run()
