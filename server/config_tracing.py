"""The part of the configuration that says where traces go."""

from __future__ import annotations

from pydantic import Field

from server.config_memory import Section


class TracingSettings(Section):
    """OpenTelemetry traces. The exporter also takes OpenTelemetry's own OTEL_EXPORTER_OTLP_... variables."""

    enabled: bool = Field(False, description="Needs the extra otel.")
    endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Where OTLP over HTTP goes, with its path; null: as OTEL_EXPORTER_OTLP_ENDPOINT says, else "
        "http://localhost:4318/v1/traces.",
    )
    service_name: str = Field("spectral", min_length=1, description="How this server is called in traces.")
    sample_ratio: float = Field(1.0, ge=0, le=1, description="Share of requests without a caller's trace to follow.")
