# Everything from a fresh Debian 12 machine (root, git, make): each target installs what it needs first.
#   make demo    two hypervisors with slash32 and guests, in one machine     (KEEP=1 leaves the rack up)
#                h1 has nf_tables, h2 iptables-legacy                        (LEGACY='h1 h2', LEGACY=none)
#   make check   lint, types, laws and budgets, unit tests, in under a minute (no root needed once deps are in)
#   make test    everything, counts reduced, under 20 minutes; make test-full   counts in full, under 80
#                (ARGS='-k word': pytest's options)
#   make soak    random worlds, three verdicts, until one differs   (SECONDS=600; SEED=n begins there)
#   make deb     the .debs in dist/;          make bench       the benchmarks (JSON=1);    make clean

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PY    := .venv/bin/python
STAMP := .venv/stamp
ROOMS := $(wildcard slash32 hooks hostd dispatcher lab bench)

APT := python3 python3-venv python3-libvirt python3-pyroute2 python3-zmq python3-lxml python3-msgpack python3-yaml \
 python3-click python3-aiohttp python3-attr python3-cattr python3-rich python3-prometheus-client python3-iptables \
 python3-lark python3-nftables python3-jsonschema \
 nftables iptables ipset iproute2 conntrack tcpdump iputils-ping procps kmod util-linux openssh-client \
 mmdebstrap cpio gcc libc6-dev build-essential debhelper dh-python python3-setuptools fakeroot dpkg-dev lintian \
 ansible-core etcd-server etcd-client openssl faketime e2fsprogs
PIP := pytest==9.2.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0 hypothesis==6.170.15 ruff==0.17.6 mypy==2.4.1 \
 types-PyYAML==6.0.12.20261113 lxml-stubs==0.5.1
# Without what it would bring along: it wants another rich than Debian's, which the tests of the command must not meet.
PIP_ALONE := schemathesis==4.32.5 harfile==0.6.0 hypothesis-graphql==0.13.5 graphql-core==3.3.2 jsonschema-rs==0.60.3 \
 pyrate-limiter==4.5.1 requests==2.34.2 urllib3==2.8.0 certifi==2026.10.18 Werkzeug==3.1.9 anyio==4.16.0

.PHONY: help deps check test test-full soak demo deb bench clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

deps: $(STAMP)

$(STAMP): Makefile
	@missing=$$({ dpkg-query -W -f='$${db:Status-Abbrev} $${Package}\n' $(APT) 2>/dev/null || true; } | sed -n 's/^ii *//p' \
	  | sort -u | comm -13 - <(printf '%s\n' $(APT) | sort -u) | tr '\n' ' '); \
	if [ -n "$${missing// /}" ]; then \
	  [ "$$(id -u)" = 0 ] || { echo "deps: run as root, or install: $$missing" >&2; exit 1; }; \
	  echo "deps: installing from apt: $$missing"; \
	  run() { DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$$@" >.apt.log 2>&1 \
	    || { tail -n 20 .apt.log >&2; echo "deps: apt-get $$1 failed (all of it in .apt.log)" >&2; exit 1; }; }; \
	  echo "deps: apt-get update"; run update; \
	  echo "deps: apt-get install (one to three minutes on a fresh machine)"; \
	  run install -y --no-install-recommends $$missing; rm -f .apt.log; \
	fi
	@echo "deps: .venv with $(PIP) $(PIP_ALONE)"
	@/usr/bin/python3 -m venv --system-site-packages .venv
	@pip() { .venv/bin/pip install -q --disable-pip-version-check "$$@" 2>.pip.log || { cat .pip.log >&2; exit 1; }; }; \
	pip $(PIP); pip --no-deps $(PIP_ALONE); rm -f .pip.log
	@touch $@; echo "deps: ready"

check: deps
	.venv/bin/ruff check .
	.venv/bin/mypy --strict $(ROOMS)
	$(PY) -m pytest -q -n 2 tests/unit

test: export SLASH32_COUNTS = reduced
test-full: export SLASH32_COUNTS = full
test test-full: deps deb
	lab/rack base
	$(PY) tests/lanes.py $(ARGS)

soak: deps
	$(PY) tests/soak.py --seconds $(if $(filter command line,$(origin SECONDS)),$(SECONDS),600) $(if $(SEED),--seed $(SEED))

demo: deps deb
	$(PY) -m lab.demo $(if $(KEEP),--keep) $(if $(LEGACY),--legacy $(filter-out none,$(LEGACY)))

deb: deps
	packaging/deb/build

bench: deps
	$(PY) -m bench $(if $(JSON),--json)

clean:
	rm -rf dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info .apt.log .pip.log
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
