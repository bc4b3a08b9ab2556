# syntax=docker/dockerfile:1
ARG RUST_VERSION=1.95.0

FROM rust:${RUST_VERSION}-bookworm AS build
WORKDIR /src
COPY . .
# jemalloc would take the size of pages of the machine that builds; kernels of arm64 have up to 64 KiB.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    if [ "$(uname -m)" = aarch64 ]; then export JEMALLOC_SYS_WITH_LG_PAGE=16; fi \
    && cargo build --locked --release --bins -p sluice-controller -p sluice-proxy -p sluice-hello -p sluice-load \
    && mkdir /out \
    && cp target/release/sluice-controller target/release/sluice-proxy target/release/sluice-hello target/release/sluice-load /out

FROM gcr.io/distroless/cc-debian12:nonroot AS base
USER 65532:65532

FROM base AS hello
COPY --from=build /out/sluice-hello /
ENTRYPOINT ["/sluice-hello"]

FROM base AS load
COPY --from=build /out/sluice-load /
ENTRYPOINT ["/sluice-load"]

FROM base AS proxy
COPY --from=build /out/sluice-proxy /
ENTRYPOINT ["/sluice-proxy"]

FROM base AS controller
COPY --from=build /out/sluice-controller /
ENTRYPOINT ["/sluice-controller"]
