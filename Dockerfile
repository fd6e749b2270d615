# Three images of one file:
#   docker build --target cpu     -t megatron-opd:cpu .      runs the toy job on any machine
#   docker build --target trainer -t megatron-opd:trainer .  coordinator and student on NVIDIA GPUs
#   docker build --target engine  -t megatron-opd:engine .   SGLang: rollout engine and teachers
# Bases are arguments: name your own mirror or another release with --build-arg.
ARG CPU_BASE=python:3.11.13-slim-bookworm
ARG TRAINER_BASE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-devel
ARG ENGINE_BASE=lmsysorg/sglang:v0.5.21

# ---------------------------------------------------------------- cpu: everything, without a GPU
FROM ${CPU_BASE} AS cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 PYTHON=python3
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 opd && mkdir /opt/megatron_opd && chown opd:opd /opt/megatron_opd
WORKDIR /opt/megatron_opd
USER opd
# The requirements alone first: a change of the code does not install them again.
COPY --chown=opd:opd requirements requirements
RUN python3 -m venv .venv && .venv/bin/python -m pip install --quiet -r requirements/trainer-cpu.txt
RUN python3 -m venv .venv-engine \
    && .venv-engine/bin/python -m pip install --quiet -r requirements/engine-cpu.txt \
    && .venv-engine/bin/python -m pip install --quiet --no-deps -r requirements/engine-cpu-nodeps.txt
COPY --chown=opd:opd . .
RUN make install
ENTRYPOINT [".venv/bin/megatron-opd"]
CMD ["train", "conf/toy.yaml"]

# ---------------------------------------------------------------- trainer: student and coordinator on GPUs
FROM ${TRAINER_BASE} AS trainer
# Compute capabilities that the kernels are built for: A100, H100, B200.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
ARG TRANSFORMER_ENGINE=2.9.0
# What pip installs as apex with its fused kernels, for example git+https://HOST/NVIDIA/apex@COMMIT; empty: no apex.
ARG APEX=""
ARG MAX_JOBS=8
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 PIP_BREAK_SYSTEM_PACKAGES=1 \
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN MAX_JOBS=${MAX_JOBS} NVTE_FRAMEWORK=pytorch \
    pip install --quiet --no-build-isolation "transformer_engine[pytorch]==${TRANSFORMER_ENGINE}"
RUN if [ -n "${APEX}" ]; then \
        MAX_JOBS=${MAX_JOBS} APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        pip install --quiet --no-build-isolation "${APEX}"; \
    fi
WORKDIR /opt/megatron_opd
COPY requirements/trainer-gpu.txt requirements/
RUN pip install --quiet -r requirements/trainer-gpu.txt
COPY . .
RUN pip install --quiet --no-deps --editable . && useradd --create-home --uid 1001 opd
USER opd
ENTRYPOINT ["megatron-opd"]
CMD ["--help"]

# ---------------------------------------------------------------- engine: SGLang as its makers ship it
FROM ${ENGINE_BASE} AS engine
WORKDIR /opt/megatron_opd
COPY megatron_opd/engines/sglang_launcher.py ./
RUN useradd --create-home --uid 1001 opd
USER opd
# -P: modules beside the launcher must not shadow SGLang's.
ENTRYPOINT ["python3", "-P", "sglang_launcher.py"]
CMD ["--help"]
