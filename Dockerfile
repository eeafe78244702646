# One image for every service; the CPU and the CUDA build differ only in where torch comes from:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 -t earmark:cuda .
ARG PYTHON=python:3.12-slim@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea
FROM ${PYTHON} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" --index-url "$TORCH_INDEX"
COPY producer producer
COPY workers workers
COPY db db
COPY earmark earmark
RUN grep -v '^torch==' constraints.txt > pins.txt && /venv/bin/pip install --no-cache-dir --constraint pins.txt ".[gpu]"

FROM ${PYTHON}
COPY --from=build /venv /venv
RUN useradd --create-home --uid 10001 earmark && install -d -o earmark /models
ENV PATH=/venv/bin:$PATH HF_HOME=/models EARMARK_DATA_DIR=/tmp/earmark NUMBA_CACHE_DIR=/tmp/numba MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1 EARMARK_WORKER__METRICS_PORT=9100
VOLUME /models
# By number, so that Kubernetes can see that it is not root.
USER 10001
WORKDIR /home/earmark
# The worker's check; other services have their own check or none.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9100/ready', timeout=3)"]
ENTRYPOINT ["earmark"]
CMD ["--help"]
