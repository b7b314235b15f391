# syntax=docker/dockerfile:1
# stablelm with all that it needs on NVIDIA's GPUs; docs/outside_slurm.md says how to build and run it.
#
# torch is that of constraints.txt. CUDA 13.0 is for drivers from 580 on, 12.6 (--build-arg CUDA=12.6) for older ones.
ARG CUDA=13.0
FROM pytorch/pytorch:2.13.0-cuda${CUDA}-cudnn9-runtime

# torch.compile and DeepSpeed's optimizers for the CPU compile when a run starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# The base image installs into the system's python, which pip refuses by default.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1
WORKDIR /opt/stablelm

# Dependencies first: a change of the code leaves their layer as it is.
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN python requirements.py s3 gcs azure > /tmp/requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement /tmp/requirements.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --constraint constraints.txt . \
    && useradd --uid 10001 --create-home stablelm \
    && install --directory --owner=stablelm /runs

USER 10001
VOLUME /runs
ENTRYPOINT ["stablelm"]
CMD ["--help"]
