"""One way to find a port, for the product's embedded server and for everything tests start."""

from billing_worker.entrypoints.local.embedded_redis import free_port

__all__ = ["free_port"]
