# The images of FIRM; BuildKit is needed (the default of Docker 23 and newer; DOCKER_BUILDKIT=1 before).
#
#     docker build -f images/firm.Dockerfile --target runtime -t firm/runtime:0.1.0 .
#
# runtime  every step that runs a model, training jobs, the critic server; PyPI's torch is CUDA's, and runs on CPUs
# slim     without torch: steps that decide, report, or launch a job and wait for it
# critic   runtime as a server with a health check, for plain Docker; on Kubernetes runtime runs `firm serve`
#
# BASE may be a digest (python:3.11-slim-bookworm@sha256:...). pip's settings, such as another package index, come in a
# file that leaves no trace in the image: --secret id=pip.conf,src=pip.conf
#
# For GPUs (docs/operations.md):
# TORCH_INDEX  an index of wheels with torch for another CUDA than PyPI's, when the nodes' driver is older
# COMPILER     gcc: a C compiler, with which Triton (torch.compile) builds its launchers; none by default
ARG BASE=python:3.11-slim-bookworm

# What slim goes without; it has all other dependencies that pyproject.toml names.
ARG NOT_SLIM="accelerate diffusers huggingface-hub peft prometheus-client safetensors starlette tensorboard torch torchvision transformers uvicorn"

FROM ${BASE} AS base
# The tools below bring their own pip; a running container needs none.
RUN python3 -m venv --without-pip /opt/firm \
 && python3 -c 'import pip, shutil; shutil.rmtree(pip.__path__[0])' \
 && rm -f /usr/local/bin/pip* /usr/bin/pip*
# Without a name the user id has no home, and programs that look up the name fail.
ENV PATH=/opt/firm/bin:$PATH HOME=/tmp USER=firm PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ARG PIP_PYTHON=/opt/firm/bin/python
ARG PIP_CACHE_DIR=/cache
ARG PIP_CONFIG_FILE=/run/secrets/pip.conf

FROM ${BASE} AS tools
ARG PIP_CACHE_DIR=/cache
ARG PIP_CONFIG_FILE=/run/secrets/pip.conf
COPY constraints.txt /src/
RUN --mount=type=cache,target=/cache --mount=type=secret,id=pip.conf \
    python3 -m venv /opt/tools && /opt/tools/bin/pip install -q -c /src/constraints.txt setuptools

# Lists of packages, so that other changes of pyproject.toml leave the layers of dependencies alone.
FROM tools AS lists
ARG NOT_SLIM
COPY images/lists.py pyproject.toml /src/
RUN mkdir /lists && cp /src/constraints.txt /lists && python3 /src/lists.py /src/pyproject.toml /lists $NOT_SLIM

FROM tools AS wheel
COPY LICENSE pyproject.toml /src/
COPY firm /src/firm
COPY pipelines /src/pipelines
RUN /opt/tools/bin/pip wheel -q --no-deps --no-build-isolation --no-index -w /wheel /src

FROM base AS slim
COPY --from=lists /lists/constraints.txt /lists/slim.txt /opt/firm/
RUN --mount=from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=cache,target=/cache --mount=type=secret,id=pip.conf \
    /opt/tools/bin/pip install -q -c /opt/firm/constraints.txt -r /opt/firm/slim.txt
# Our code comes last: a change of it is pushed in seconds.
RUN --mount=from=tools,source=/opt/tools,target=/opt/tools --mount=from=wheel,source=/wheel,target=/wheel \
    /opt/tools/bin/pip install -q --no-cache-dir --no-deps --no-index /wheel/*.whl
WORKDIR /tmp
USER 65532:65532
ENTRYPOINT ["firm"]
ARG VERSION
ARG REVISION
ARG SOURCE
LABEL org.opencontainers.image.title="FIRM without torch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"

FROM base AS whole
# torch and CUDA have a layer of their own: five of seven gigabytes that rarely change.
# Another CUDA's torch brings libraries of its own; of equal versions, pip takes the one whose name ends in +cuNNN.
COPY --from=lists /lists/constraints.txt /lists/torch.txt /opt/firm/
ARG TORCH_INDEX
RUN [ -z "$TORCH_INDEX" ] || sed -i '/^nvidia-/d; /^triton==/d' /opt/firm/constraints.txt
RUN --mount=from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=cache,target=/cache --mount=type=secret,id=pip.conf \
    PIP_EXTRA_INDEX_URL=$TORCH_INDEX /opt/tools/bin/pip install -q -c /opt/firm/constraints.txt -r /opt/firm/torch.txt
COPY --from=lists /lists/all.txt /opt/firm/
RUN --mount=from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=cache,target=/cache --mount=type=secret,id=pip.conf \
    /opt/tools/bin/pip install -q -c /opt/firm/constraints.txt -r /opt/firm/all.txt
ARG COMPILER
RUN [ -z "$COMPILER" ] || { apt-get update -q && apt-get install -qy --no-install-recommends "$COMPILER" libc6-dev \
 && rm -rf /var/lib/apt/lists/*; }
RUN --mount=from=tools,source=/opt/tools,target=/opt/tools --mount=from=wheel,source=/wheel,target=/wheel \
    /opt/tools/bin/pip install -q --no-cache-dir --no-deps --no-index /wheel/*.whl
WORKDIR /tmp
# glibc would return the memory of large tensors to the system after each training step.
ENV MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824
USER 65532:65532
ENTRYPOINT ["firm"]
ARG VERSION
ARG REVISION
ARG SOURCE
LABEL org.opencontainers.image.title="FIRM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"

FROM whole AS critic
ENTRYPOINT ["firm", "serve", "--host", "0.0.0.0"]
EXPOSE 8000
HEALTHCHECK --start-period=120s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=3)"]

FROM whole AS runtime
