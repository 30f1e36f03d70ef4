# Serve a trained run over HTTP, on the CPU. docs/deploy.md explains how to use it:
#   docker build --tag msflow-serve .
#   docker run --publish 8000:8000 --env MSFLOW_TOKEN --volume "$PWD/runs/mine:/run:ro" msflow-serve

FROM python:3.13-slim AS build

# Only to compile the kernels; any version of the compiler will do.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install --yes --no-install-recommends g++ \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY . .
ENV MSFLOW_EXT_REQUIRE_NATIVE=1
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .


FROM python:3.13-slim

# torch without CUDA comes from PyTorch's own index, and is much smaller.
RUN pip install --no-cache-dir "torch>=2.10" "torchvision>=0.25" --index-url https://download.pytorch.org/whl/cpu
# The wheel's name holds its version, so that the shell must find it.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
  pip install --no-cache-dir "$(echo /wheels/*.whl)[serve]"

RUN useradd --create-home --uid 1000 msflow
USER 1000
WORKDIR /home/msflow

EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# Reachable from outside the container, the service demands MSFLOW_TOKEN of the environment.
# More flags may follow the image's name in docker run, such as --allow-host or --precision.
ENTRYPOINT ["msflow", "serve", "--run", "/run", "--host", "0.0.0.0", "--port", "8000"]
