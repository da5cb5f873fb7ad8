# docker build -t spectral:local .                   CPU, the default
# docker build --target cuda -t spectral:gpu .       for NVIDIA GPUs; run with --gpus all
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
WORKDIR /src
ENV VIRTUAL_ENV=/opt/spectral UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy
# The newest uv is wanted: it knows the newest builds of torch.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir uv && uv venv /opt/spectral

# torch first, in a layer of its own: it is by far the largest and changes least.
FROM build AS build-cpu
RUN uv pip install --no-cache --torch-backend=cpu "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE config.yaml ./
COPY models ./models
COPY profiles ./profiles
COPY spectral ./spectral
COPY server ./server
RUN uv pip install --no-cache --torch-backend=cpu .

FROM build AS build-cuda
ARG TORCH_BACKEND=cu130
RUN uv pip install --no-cache --torch-backend=${TORCH_BACKEND} "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE config.yaml ./
COPY models ./models
COPY profiles ./profiles
COPY spectral ./spectral
COPY server ./server
RUN uv pip install --no-cache --torch-backend=${TORCH_BACKEND} ".[gpu]"

FROM python:${PYTHON_VERSION}-slim AS runtime
RUN useradd --create-home --home-dir /data --uid 10001 spectral
ENV PATH=/opt/spectral/bin:$PATH OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 SPECTRAL_SERVER__ALLOW_PUBLIC=true
# Home and working folder are one: the server's state, profiles made here, compiled kernels and a config.yaml of your own.
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
# Inside a container the loopback address cannot be published; docker-compose.yml publishes the port on the host's loopback only.
# The server starts only with keys (SPECTRAL_AUTH__KEYS_FILE) or with SPECTRAL_AUTH__ALLOW_WITHOUT_KEYS=true.
ENTRYPOINT ["spectral"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

FROM runtime AS cuda
# Triton compiles a small launcher on first use. The base image pins the distribution, and so the compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/spectral /opt/spectral
USER 10001

FROM runtime AS cpu
COPY --from=build-cpu /opt/spectral /opt/spectral
USER 10001
