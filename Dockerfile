# The image of a training job on Kubernetes; the code is in /imagen_jax.
#   docker build -t IMAGE . && docker push IMAGE
#   docker build -t IMAGE --build-arg EXTRAS=cuda12,gcs .     # for GPUs
FROM python:3.12-slim
ARG EXTRAS=tpu,gcs
WORKDIR /imagen_jax
# The dependencies alone, in a layer that changes to the code leave valid.
COPY requirements.lock setup.py pyproject.toml ./
COPY imagen_jax/__init__.py imagen_jax/
COPY configs/common.py configs/
RUN pip install --no-cache-dir -c requirements.lock ".[$EXTRAS]"
COPY . .
RUN pip install --no-cache-dir --no-deps -e .
