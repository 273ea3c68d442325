# Everything that one does with this project, on Debian 12 as root. Each target installs what it lacks.

PYTHON ?= python3
VENV := .venv
BASICS := python3-venv
DEB := build-essential debhelper dh-python libxml2-utils lintian python3-all python3-setuptools pybuild-plugin-pyproject
LAB := user-mode-linux charon-systemd strongswan-swanctl iproute2 iputils-ping kmod nftables
QEMU := qemu-system-x86 busybox-static cpio ethtool
TEST := $(LAB) $(DEB) debootstrap
FUZZ_S := 600

# $(call need,PACKAGES): install the Debian packages among them that are missing
need = @missing=$$(for name in $(1); do \
	dpkg-query -W -f '$${Status}' $$name 2>/dev/null | grep -q ' installed$$' || echo $$name; done); \
	[ -z "$$missing" ] || { echo "installing $$missing" | tr '\n' ' '; echo; \
	apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $$missing >/dev/null; }

.PHONY: demo test lab-kernel test-long fuzz lint bench templates deb clean help
.DEFAULT_GOAL := demo

demo: $(VENV)/ready  ## two strongSwan peers, the service and VPP: tunnels come up, rekey, go, and VPP follows
	$(call need,$(LAB))
	$(VENV)/bin/python tests/lab/demo.py

test: $(VENV)/ready  ## all tests, with the newest packages and with Debian 12's
	$(call need,$(TEST))
	$(VENV)/bin/tox run

lab-kernel: $(VENV)/ready  ## fetch what tests with VPP_BIN need to boot Debian's kernel in QEMU; nothing is installed as a kernel
	$(call need,$(LAB) $(QEMU))
	PYTHONPATH=tests $(VENV)/bin/python tests/lab/qemu.py

test-long: $(VENV)/ready  ## the long runs: 2,000 stories of 30 steps, 100,000 hostile SAs
	$(call need,$(TEST))
	VPPIPSEC_LONG=1 $(VENV)/bin/tox run -e newest -- --timeout 14400 tests/sync tests/hostile

fuzz: $(VENV)/ready  ## guided fuzzing of the netlink decoder and the status socket, FUZZ_S seconds each
	$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[fuzz]'
	$(VENV)/bin/python tests/fuzz/run.py --seconds $(FUZZ_S) wire status

lint: $(VENV)/ready  ## ruff and mypy
	$(VENV)/bin/tox run -e lint

bench: $(VENV)/ready  ## bursts and rekeys of 100, 1,000 and 10,000 tunnels beside VPP's own time (VPP_BIN names a VPP)
	$(VENV)/bin/python bench/run.py

templates:  ## node.def trees and xml_ref entry for VyOS, from the XML definitions, in build
	$(call need,libxml2-utils)
	/usr/bin/python3 tools/templates.py --out build

deb:  ## the Debian package, in dist
	$(call need,$(DEB))
	tools/deb.sh dist

clean:  ## remove what the other targets made
	rm -rf $(VENV) .tox build dist

$(VENV)/ready: pyproject.toml
	$(call need,$(BASICS))
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[test]' tox
	touch $@

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /    make \1\t/p' $(MAKEFILE_LIST)
