#!/bin/sh
# nvcc and a static cudart from NVIDIA's Python packages into the folder $1, for images without CUDA;
# afterwards CUDA_HOME=$1/nvidia/cu13. The version is that of the developers' machines.
set -eu
for python in /opt/python/cp312-cp312/bin/python python3; do
    command -v "$python" > /dev/null && break
done
"$python" -m pip install --quiet --target "$1" \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
ln -sfn lib "$1/nvidia/cu13/lib64"  # where nvcc.profile looks
"$1/nvidia/cu13/bin/nvcc" --version
