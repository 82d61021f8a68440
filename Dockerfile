# syntax=docker/dockerfile:1
# One binary on a small Debian, run by a user who owns nothing but /data.
#
#   docker build -t vestibule .

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
# The caches outlive a build and are not part of the image, so the binary is copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --package vestibule \
    && cp target/release/vestibule /vestibule

FROM debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin vestibule \
    && install -d -o vestibule -g vestibule -m 700 /data /subscribers
COPY --from=build /vestibule /usr/local/bin/vestibule

# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
# The connector's log lives here: mount a disk that outlives the container, and no two containers on one.
WORKDIR /data
ENV VESTIBULE_CONFIG=/etc/vestibule/vestibule.toml \
    VESTIBULE_DATA=/data \
    VESTIBULE_LOG_FORMAT=json
EXPOSE 7171
# Ready, not only alive: a connector that cannot write its log says so here.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["vestibule", "ready"]
ENTRYPOINT ["vestibule"]
CMD ["up"]
