# What people and CI do. Set-up runs once, and again when what it reads has changed.
PYTHON ?= python3
# Python compiles what is really imported, at its first import: half the time of the set-up.
INSTALL = bin/python -m pip install --quiet --no-compile --disable-pip-version-check

.PHONY: demo test check bench bench-serving soak serve proto wheel clean

demo: .venv-demo/ready  ## train nothing, see everything: the shipped bundle answers
	.venv-demo/bin/python -m demo

test: check .venv-interop/ready  ## what CI runs
	scripts/test

check: .venv/ready .venv-proto/ready  ## style, types, stubs, protos, Dockerfiles
	scripts/check

bench: .venv/ready  ## how near sampling and scoring are to the hardware's limit
	.venv/bin/python -m bench

bench-serving: .venv/ready  ## how near the server is to raw runs and a bare echo
	.venv/bin/python -m bench.serving

soak: .venv/ready  ## ten minutes of load with callers that leave: does memory grow?
	.venv/bin/python -m bench.serving --soak 600

serve: .venv-demo/ready  ## the shipped bundle on the default ports
	.venv-demo/bin/likely serve

proto: .venv-proto/ready  ## regenerate the committed stubs
	PYTHON=.venv-proto/bin/python scripts/proto

wheel: .venv/ready  ## dist/likely-*.whl
	.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-demo .venv-interop .venv-proto build dist

# Development: torch, and the runtime that production uses (it also runs on the CPU).
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) --upgrade 'pip>=25.1'
	$(@D)/$(INSTALL) -c constraints.txt -e '.[gpu,export,demo,signing,ray,tracing]' --group dev
	touch $@

# What a server is installed with: no torch.
.venv-demo/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) -c constraints.txt -e '.[cpu,demo]'
	touch $@

# The generator needs an older protobuf than everything else.
.venv-proto/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) --upgrade 'pip>=25.1'
	$(@D)/$(INSTALL) --group proto
	touch $@

# Clients that others wrote; perf_analyzer comes in a folder of its own, without what it asks for.
.venv-interop/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) --upgrade 'pip>=25.1'
	$(@D)/$(INSTALL) --group interop
	$(@D)/$(INSTALL) --no-deps --target $(@D)/perf-analyzer --upgrade --group perf-analyzer
	touch $@
