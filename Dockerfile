# The server, `gobelin serve`, on a CPU: docker build -t gobelin . && docker run -e GOBELIN_TOKEN=… -p 127.0.0.1:7860:7860 gobelin
FROM python:3.12-slim

# Kernels of ours are compiled when they are first used, where there is a compiler: painting is faster with them.
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/gobelin
COPY pyproject.toml README.md LICENSE NOTICE constraints.txt ./
COPY src src
# TORCH_INDEX may name an index that has CPU builds of torch, which are smaller: --build-arg TORCH_INDEX="--index-url URL"
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir --constraint constraints.txt torch $TORCH_INDEX \
    && pip install --no-cache-dir --constraint constraints.txt ".[server]"

RUN useradd --create-home gobelin
USER gobelin
WORKDIR /home/gobelin

EXPOSE 7860
# It paints a step: a server whose model hangs is not healthy.
HEALTHCHECK --interval=60s --timeout=40s --start-period=60s CMD ["python", "-c", "\
import os, urllib.request as web; \
web.urlopen(web.Request('http://127.0.0.1:7860/healthz', headers={'Authorization': 'Bearer ' + os.environ['GOBELIN_TOKEN']}), timeout=35)"]

# Others can reach a container's port, so GOBELIN_TOKEN has to be set: it does not start without.
ENTRYPOINT ["gobelin", "serve", "--host", "0.0.0.0"]
