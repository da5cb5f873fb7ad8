# CPU by default. For an NVIDIA GPU name the CUDA build of torch and the extra, and run with --gpus all:
#   docker build --build-arg TORCH_BACKEND=cu130 --build-arg EXTRAS=[gpu] -t spectral:gpu .
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_BACKEND=cpu
ARG EXTRAS=
WORKDIR /src
ENV VIRTUAL_ENV=/opt/spectral UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir uv && uv venv /opt/spectral
# torch first, in a layer of its own: it is by far the largest and changes least.
RUN uv pip install --no-cache --torch-backend=${TORCH_BACKEND} "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE config.yaml ./
COPY models ./models
COPY profiles ./profiles
COPY spectral ./spectral
COPY server ./server
RUN uv pip install --no-cache --torch-backend=${TORCH_BACKEND} ".${EXTRAS}"

FROM python:${PYTHON_VERSION}-slim
# Triton compiles a small launcher on first use, so a GPU image needs a C compiler; the CPU image does not.
ARG EXTRAS=
RUN if [ -n "${EXTRAS}" ]; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi \
    && useradd --create-home --home-dir /data --uid 10001 spectral
COPY --from=build /opt/spectral /opt/spectral
ENV PATH=/opt/spectral/bin:$PATH OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 SPECTRAL_SERVER__ALLOW_PUBLIC=true
USER spectral
# Home and working folder are one: profiles made here, compiled kernels and a config.yaml of your own all live in /data.
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Inside a container the loopback address cannot be published; docker-compose.yml publishes the port on the host's loopback only.
# The server starts only with keys (SPECTRAL_AUTH__KEYS_FILE) or with SPECTRAL_AUTH__ALLOW_WITHOUT_KEYS=true.
ENTRYPOINT ["spectral"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
