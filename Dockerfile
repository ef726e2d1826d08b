# A classifier or generator with exits behind `consistentee serve`, on CPU: docs/serve.md.
#
#     docker build -t consistentee .
#     docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/fast:/model:ro" consistentee
#
# Left alone pip fetches a torch with CUDA, gigabytes of it: give PyTorch's index of CPU builds as
# --build-arg PIP_EXTRA_INDEX_URL=..., and pip takes "2.13.0+cpu".
FROM python:3.11-slim AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY . /source
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --constraint /source/constraints.txt "/source[serve,onnx]"

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 consistentee
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
USER consistentee
WORKDIR /home/consistentee
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["consistentee", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
