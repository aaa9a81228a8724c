# A box with CUDA for train_gpt.py. PyPI's torch brings CUDA; the host needs an NVIDIA driver and its container toolkit.
#   docker build -t train_gpt .
#   docker run --rm --gpus all --ipc=host -v $PWD/data:/app/data -v $PWD/runs:/app/runs -e OUT_DIR=runs train_gpt
FROM python:3.12-slim

# Triton compiles its launchers with gcc.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt 'kernels>=0.12'

# FlashAttention 3, for this torch and CUDA, into the cache that a run reads. Where there is no such build, cuDNN serves.
RUN python -c "import kernels; kernels.install_kernel('kernels-community/flash-attn3', revision='v1')" \
    || echo "no FlashAttention 3 for this torch: ATTENTION=auto takes cuDNN or SDPA"

COPY . .
ENV TORCHINDUCTOR_CACHE_DIR=/app/runs/torchinductor
CMD ["python", "train_gpt.py"]
