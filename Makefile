# Every target does its own set-up. Everything that is built or downloaded lands in $(HERMES_CACHE), outside the checkout.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Recipes share one target folder; cargo uses the cores.
.NOTPARALLEL:

export HERMES_CACHE ?= $(HOME)/.cache/hermes
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)

# Arguments for the demo and the benchmarks, such as `make demo ARGS=--json` or `make demo IMAGE=docker.io/library/nginx`.
ARGS ?=
IMAGE ?=
# Minutes that each fuzz target runs.
MINUTES ?= 10
# Seconds that each soak test runs.
SECONDS ?= 300

# Prepares the tools of one group and then runs a command in the environment that building needs.
run = tools/setup $(1) && . tools/environment && $(2)

.PHONY: help demo test check lint bench bench-start calibrate fuzz screenshot soak render clean-cache

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: ## A real program in a real image: full pull, cold from the registry, cold from a peer, warm
	@$(call run,demo,cargo run --locked --release --bin hermes -- demo $(if $(IMAGE),--image $(IMAGE)) $(ARGS))

test: ## Everything that CI runs: the checks, then all tests
	@.ci/run

check: ## Formatting, lints and dependency rules; warnings are errors
	@$(call run,build,tools/check)

bench: ## Index, read, full download, file system, memory, swarm and status page benchmarks; prints tables
	@$(call run,bench,image=$(or $(IMAGE),oci:$$(tools/images spark | tail -n 1)) && \
		for each in "index $$image" "read $$image" "full $$image" fs cgroup swarm page; do \
			cargo run --locked --release --bin hermes -- bench $$each $(ARGS); done)

bench-start: ## From the pull to the first answer of real programs, in every way to start them; ARGS='--docs docs' writes it down
	@$(call run,bench,cargo run --locked --release --bin hermes -- bench start $(ARGS))

calibrate: ## Fleets of real nodes and the same fleets simulated, beside each other
	@$(call run,test,HERMES_CALIBRATE=1 unshare --mount --propagation private cargo test --locked --release \
		--test e2e -- --nocapture calibrate::)

fuzz: ## Fuzz every decoder for MINUTES each (default 10)
	@$(call run,build,tools/fuzz $(MINUTES))

screenshot: ## Take the picture of the status page that stands in docs/
	@$(call run,test,cargo run --locked --release --bin hermes -- bench page --screenshot docs/status-page.png $(ARGS))

soak: ## The long tests: the daemon killed and upgraded under load for SECONDS (default 300) in each way; hundreds of pods; outages; fleets; controllers; power cuts
	@$(call run,test,HERMES_SOAK_SECONDS=$(SECONDS) unshare --mount --propagation private cargo test --locked \
		--test e2e -- --nocapture --test-threads 1 keeper_load:: rounds:: many:: outage:: prepare:: \
		fleet:: controller_storm:: power:: power_handover::)

render: ## deploy/rbac.yaml and deploy/manifests, from the chart
	@tools/render

clean-cache: ## Remove everything that was built or downloaded
	rm -rf --one-file-system "$(HERMES_CACHE)"
