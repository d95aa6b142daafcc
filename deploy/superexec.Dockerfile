# Flower's SuperExec with what the app needs; the app itself comes with each run. UNTESTED, see compose.yaml.
ARG FLWR_VERSION=1.41.0
FROM flwr/superexec:${FLWR_VERSION}

WORKDIR /app
# hatchling wants the readme, the licence and the packages to be there. A copy of them installed does no harm: Flower
# puts the run's own before it.
COPY --chown=app:app pyproject.toml README.md LICENSE ./
COPY --chown=app:app flexfed flexfed
COPY --chown=app:app strategies strategies
# Flower itself stays the image's own version. The volumes of compose.yaml take over who owns this folder.
RUN sed -i '/"flwr\[simulation\]/d' pyproject.toml && pip install --no-cache-dir . && mkdir -p /app/.flexfed

ENTRYPOINT ["flower-superexec"]
