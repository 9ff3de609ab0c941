"""Metrics for Prometheus, in a registry of the server's own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_STEP_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_REQUEST_SECONDS = (0.001, 0.01, 0.1, 1, 10, 100)


class Metrics:
    """Counters of jobs, images, steps, batches and requests."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.jobs = Counter("gobelin_jobs", "Jobs that ended", ["kind", "state"], registry=registry)
        self.images = Counter("gobelin_images", "Images of finished jobs", registry=registry)
        self.job_seconds = Histogram(
            "gobelin_job_seconds", "Seconds that a job ran", ["kind"], buckets=_REQUEST_SECONDS, registry=registry
        )
        self.step_seconds = Histogram(
            "gobelin_step_seconds", "Seconds of a step of a batch", buckets=_STEP_SECONDS, registry=registry
        )
        self.batches = Histogram(
            "gobelin_batch_jobs", "Jobs that were painted together", buckets=(1, 2, 4, 8, 16), registry=registry
        )
        self.requests = Counter("gobelin_requests", "Requests", ["method", "route", "status"], registry=registry)
        self.waiting = Gauge("gobelin_waiting_jobs", "Jobs that wait", registry=registry)
        self.kept_bytes = Gauge("gobelin_kept_bytes", "Bytes of finished jobs", registry=registry)

    def text(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self.registry)
