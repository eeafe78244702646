# One image for every service; the CPU and the CUDA build differ only in where torch comes from.
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir "torch>=2.6" --index-url "$TORCH_INDEX"
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY console console
COPY producer producer
COPY workers workers
COPY db db
COPY earmark earmark
RUN grep -v '^torch==' constraints.txt > pins.txt && /venv/bin/pip install --no-cache-dir --constraint pins.txt .

FROM python:3.12-slim
COPY --from=build /venv /venv
RUN useradd --create-home --uid 10001 earmark && install -d -o earmark /models
ENV PATH=/venv/bin:$PATH HF_HOME=/models EARMARK_DATA_DIR=/tmp/earmark PYTHONUNBUFFERED=1
USER earmark
WORKDIR /home/earmark
ENTRYPOINT ["earmark"]
CMD ["--help"]
