# CPU:  docker build -t modification-studio --build-arg TORCH_INDEX=<PyTorch's index of CPU wheels, see pytorch.org> .
# CUDA: docker build -t modification-studio .       (the usual index's torch for Linux comes with CUDA)
# Run:  docker run -p 7860:7860 -v /my/models:/models:ro modification-studio --model /models/NAME
FROM python:3.12-slim

# Another index for torch alone; empty: the usual one.
ARG TORCH_INDEX=

# The compiler builds the CPU kernels at first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 user
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} "torch>=2.8,<2.14" \
    && pip install --no-cache-dir -r requirements.txt
COPY --chown=root:root . .

USER user
ENV HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=0 PYTHONUNBUFFERED=1
EXPOSE 7860
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=5)"]
# Exec form: the app itself is told to end, and finishes the answers under way.
ENTRYPOINT ["python", "app.py", "--host", "0.0.0.0", "--port", "7860", "--converted", "/home/user/converted"]
