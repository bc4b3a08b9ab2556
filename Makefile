# Sluice. `make demo` and `make test` are the two commands to know; both do their own set-up.
SHELL := /bin/bash
.DEFAULT_GOAL := help
NAME ?= sluice
NODES ?= 1
# Properties are tried on the same cases by everybody, so that a change is blamed for what it breaks; PROPTEST_RNG_SEED=N tries others.
export PROPTEST_RNG_SEED ?= 1

.PHONY: help
help: ## What there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

.PHONY: demo
demo: ## Watch releases on a real cluster under load (FAST=1: three minutes; KEEP=1: leaves it up; JSON=FILE: the table)
	cargo build --workspace --bins $${WITH_TESTS:+--tests}
	tests/with-cluster demo $${CARGO_TARGET_DIR:-target}/debug/sluice-demo

.PHONY: test
test: test-unit test-e2e ## The tests that every change runs: unit, bare API server, releases end to end on the real cluster

.PHONY: test-unit
test-unit: test-chart ## Unit tests, and the controller against a real API server without nodes
	tests/packages lua5.1
	# Without a cluster those of tests/e2e that need one say so, and end.
	env -u KUBECONFIG cargo test --workspace

.PHONY: test-chart
test-chart: ## The chart: lint, mistakes it must refuse, golden renders, alerts, a real API server (UPDATE=1 writes the renders)
	tests/cluster/build >/dev/null
	tests/packages prometheus python3
	tests/chart/run

.PHONY: test-e2e
test-e2e: ## Releases end to end on the real cluster (or on the one that KUBECONFIG names)
	tests/e2e/run

.PHONY: test-operations
test-operations: ## End to end: the quickstart, Git tools that apply all the time, the core of faults and deletions
	tests/e2e/run --test quickstart
	tests/e2e/run --test gitops --test faults --test deletions

.PHONY: test-cluster
test-cluster: ## End to end, all of it, on two nodes: faults, upgrades, deletions, another version, autoscaling, a node drained and lost
	FULL=1 NODES=2 tests/e2e/run
	$(if $(KUBECONFIG),,POLICIES=1 tests/e2e/run --test gitops --test deletions --test faults)

.PHONY: bench
bench: ## CPU, latency and memory against Envoy and HAProxy, in one run (QUICK=1: under 4 minutes; ONLY=TEXT: some rows; JSON=FILE: all rounds)
	tests/bench/run

.PHONY: scale
scale: ## What 1, 100 and 500 Canaries cost when nothing happens (COUNTS=1,100 WINDOW=60; JSON=FILE: the table; QUICK=1: only that it runs)
	$(if $(QUICK),COUNTS=1 WINDOW=5 tests/with-cluster scale $${CARGO_TARGET_DIR:-target}/debug/sluice-scale,PROFILE=release tests/with-cluster scale $${CARGO_TARGET_DIR:-target}/release/sluice-scale)

.PHONY: conformance
conformance: ## The proxy held to other people's tests: h2spec, smuggling corpus, beside Envoy
	tests/conformance/run

.PHONY: conformance-ondemand
conformance-ondemand: ## The same with tests that are run on demand: a TLS scanner, slowhttptest, grpc-js and tonic
	tests/conformance/run on-demand

.PHONY: fuzz
fuzz: ## Searches for bytes that break the proxy (SECONDS_EACH=60 TARGETS="request answer hello trace xds")
	tests/fuzz/run $(TARGETS)

.PHONY: cluster
cluster: ## A real Kubernetes in seconds (NAME=sluice NODES=1)
	tests/cluster/packages
	tests/cluster/build >/dev/null
	tests/cluster/up $(NAME) $(NODES)

.PHONY: cluster-down
cluster-down: ## Takes it away
	tests/cluster/down $(NAME)

.PHONY: crds
crds: ## Writes the CRDs from their Rust types
	cargo run -q -p sluice-crds --bin crdgen > charts/sluice/files/crds/sluice.dev.yaml

.PHONY: reference
reference: ## Writes docs/reference.md from the types and the metrics
	cargo run -q -p sluice-docs > docs/reference.md

.PHONY: chart-readme
chart-readme: ## Writes the README of the chart's values
	tests/chart/readme > charts/sluice/README.md

.PHONY: fmt lint deny
fmt: ## Formats the code
	cargo fmt --all
lint: ## Formatting and clippy, as CI does
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
deny: ## Licences, sources, duplicates and second crypto providers
	tests/cargo-deny check bans licenses sources
