"""Prometheus metrics of the gateway, served at /metrics. Every name that a dashboard or alert uses is defined here."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class ServingMetrics:
    """One set for one gateway process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make: Any = {"registry": self.registry}
        self.requests = Counter("fluid_http_requests_total", "answered requests", ["route", "status"], **make)
        self.seconds = Histogram(
            "fluid_http_request_seconds", "time to the end of the answer", ["route"], buckets=SECONDS, **make
        )
        self.images = Counter("fluid_images_total", "finished images", ["model"], **make)
        self.rejected = Counter("fluid_rejected_total", "requests not taken or not finished, by reason", ["reason"], **make)
        self.retries = Counter("fluid_replica_retries_total", "requests sent again because a replica went away", **make)
        self.cancelled = Counter("fluid_cancelled_total", "requests whose client went away", **make)
        self.in_flight = Gauge("fluid_images_in_flight", "images that wait or run", **make)
        self.capacity = Gauge("fluid_images_in_flight_limit", "beyond it clients get 429", **make)
        self.queue_seconds = Histogram("fluid_queue_seconds", "wait until an image joins a batch", buckets=SECONDS, **make)
        self.generation_seconds = Histogram(
            "fluid_generation_seconds", "from joining a batch to the last image of the request", buckets=SECONDS, **make
        )
        self.batch_size = Histogram(
            "fluid_batch_size", "images in the batch when a request ended", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), **make
        )
        self.batch_items = Counter("fluid_batch_items_total", "lines of batch jobs, by result", ["result"], **make)
        self.model = Gauge("fluid_model_info", "1 for the version that made the last image", ["model"], **make)
        self.ready = Gauge("fluid_ready", "1 when an image was generated and the server is not draining", **make)

    def text(self) -> bytes:
        return generate_latest(self.registry)
