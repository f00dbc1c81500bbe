# `docker build -t loratools .`, then `docker run --rm -v "$PWD:/data:ro" loratools check adapters/`.
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY loratools loratools
COPY formats formats
RUN python -m venv /opt/loratools && /opt/loratools/bin/pip install --no-cache-dir .

FROM python:3.13-slim
COPY --from=build /opt/loratools /opt/loratools
RUN useradd --uid 10001 --create-home loratools
USER 10001
WORKDIR /data
ENTRYPOINT ["/opt/loratools/bin/loratools"]
CMD ["--help"]
