# Everything that one does with this project, on Debian 12 as root. Each target installs what it lacks.

PYTHON ?= python3
VENV := .venv
DEB := build-essential debhelper dh-python libxml2-utils lintian python3-all python3-setuptools pybuild-plugin-pyproject
TEST := $(DEB) debootstrap
FUZZ_S := 600

# $(call need,WHY,PACKAGES): install the Debian packages among them that are missing; no service is started or enabled
need = @tools/setup.sh packages "$(1)" $(2)

.PHONY: demo check test coverage lab-kernel test-long fuzz lint bench templates deb clean help
.DEFAULT_GOAL := demo

demo: $(VENV)/ready  ## two strongSwan peers, the service and VPP: tunnels come up, rekey, go, and VPP follows
	@PYTHONPATH=tests $(VENV)/bin/python tests/lab/demo.py

check: $(VENV)/ready  ## the tests to run after each change: all but the slow, the lab, the package and a real VPP
	$(call need,for the tests,iproute2 nftables libxml2-utils)
	env -u VPP_BIN $(VENV)/bin/pytest -n $$((2 * $$(nproc))) --dist loadgroup -m 'not (slow or lab or package)' # half of them wait

test: $(VENV)/ready  ## all tests with the newest packages, and with Debian 12's those that depend on a package's version
	$(call need,to build and check the package,$(TEST))
	@PYTHONPATH=tests $(VENV)/bin/python tests/lab/kernels.py
	$(VENV)/bin/tox run

coverage: $(VENV)/ready  ## which lines of the library no test runs; takes twice as long as the tests alone
	$(call need,to build and check the package,$(TEST))
	@PYTHONPATH=tests $(VENV)/bin/python tests/lab/kernels.py
	$(VENV)/bin/tox run -e newest -- --cov --cov-report=term-missing:skip-covered

lab-kernel: $(VENV)/ready  ## find or fetch a kernel with all that the lab needs with VPP_BIN; none is installed
	@PYTHONPATH=tests $(VENV)/bin/python tests/lab/kernels.py --wires

test-long: $(VENV)/ready  ## the long runs: 2,000 stories of 30 steps, 100,000 hostile SAs
	$(call need,to build and check the package,$(TEST))
	VPPIPSEC_LONG=1 $(VENV)/bin/tox run -e newest -- --timeout 14400 tests/sync tests/hostile

fuzz: $(VENV)/ready  ## guided fuzzing of the netlink decoder and the status socket, FUZZ_S seconds each
	$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[fuzz]'
	$(VENV)/bin/python tests/fuzz/run.py --seconds $(FUZZ_S) wire status

lint: $(VENV)/ready  ## ruff and mypy
	$(VENV)/bin/tox run -e lint

bench: $(VENV)/ready  ## bursts and rekeys of 100, 1,000 and 10,000 tunnels beside VPP's own time (VPP_BIN names a VPP)
	$(VENV)/bin/python bench/run.py

templates:  ## node.def trees and xml_ref entry for VyOS, from the XML definitions, in build
	$(call need,to check the XML,libxml2-utils)
	/usr/bin/python3 tools/templates.py --out build

deb:  ## the Debian package, in dist
	$(call need,to build the package,$(DEB))
	tools/deb.sh dist

clean:  ## remove what the other targets made
	rm -rf $(VENV) .tox build dist

$(VENV)/ready: pyproject.toml
	$(call need,to make a Python environment,python3-venv)
	@tools/setup.sh run "Making a Python environment in $(VENV)" $(PYTHON) -m venv $(VENV)
	@tools/setup.sh run "Installing the service, its libraries and the test tools from PyPI into $(VENV)" \
		$(VENV)/bin/pip install --disable-pip-version-check -e '.[test]' tox
	@touch $@

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /    make \1\t/p' $(MAKEFILE_LIST)
