# One image with all programs of the project: operator, node-daemon, engine, seat and importer. Static programs and nothing else.
#
#   docker build -t fault-tolerant-vm:VERSION .
#
# Where the programs are built already, their folder takes the place of the first stage: --build-context builder=DIR, with them in DIR/programs.
ARG RUST_VERSION=1.95

FROM rust:${RUST_VERSION}-slim-bookworm AS builder
WORKDIR /source
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/source/target \
    cargo build --release --locked --package ftvm-operator --package ftvm-node-daemon --package ftvm-engine --bins \
    && mkdir /programs \
    && cd target/x86_64-unknown-linux-gnu/release \
    && for program in ftvm-operator ftvm-node-daemon ftvm-engine seat importer; do \
         strip --strip-debug -o /programs/$program $program || exit 1; \
       done

FROM scratch
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fault-tolerant-vm" \
      org.opencontainers.image.description="Virtual machines that keep running when the machine under them dies" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=builder /programs/ /
# The node-daemon's pods say that they need root; nothing else does.
USER 65532:65532
CMD ["/ftvm-operator", "--version"]
