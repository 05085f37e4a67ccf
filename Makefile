# Entry points for developers and CI. An environment is set up once, and again when its inputs change.
PYTHON ?= python3
# Without compiling, set-up takes half the time; Python compiles a module when it is first imported.
INSTALL = bin/python -m pip install --quiet --no-compile --disable-pip-version-check

.PHONY: demo test check bench bench-serving soak serve proto wheel clean

demo: .venv-demo/ready  ## serve three bundles, query them and plot the answers; trains nothing
	.venv-demo/bin/python -m demo

test: check .venv-interop/ready  ## run all checks and tests, as CI does
	scripts/test

check: .venv/ready .venv-proto/ready  ## check style, types, stubs, protos and Dockerfiles
	scripts/check

bench: .venv/ready  ## compare the speed of sampling and scoring with the hardware's limit
	.venv/bin/python -m bench

bench-serving: .venv/ready  ## compare the speed of the server with raw runs and a bare gRPC echo
	.venv/bin/python -m bench.serving

soak: .venv/ready  ## load a server for ten minutes, with callers that leave: does memory grow?
	.venv/bin/python -m bench.serving --soak 600

serve: .venv-demo/ready  ## serve the shipped bundle on the default ports
	.venv-demo/bin/likely serve

proto: .venv-proto/ready  ## regenerate the committed stubs
	PYTHON=.venv-proto/bin/python scripts/proto

wheel: .venv/ready  ## build dist/likely-*.whl
	.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-demo .venv-interop .venv-proto build dist

# Development: torch, and the GPU build of the runtime, as in production (it also runs on the CPU).
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) --upgrade 'pip>=25.1'
	$(@D)/$(INSTALL) -c constraints.txt -e '.[gpu,export,demo,signing,ray,tracing]' --group dev
	touch $@

# A server: without torch.
.venv-demo/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) -c constraints.txt -e '.[cpu,demo]'
	touch $@

# The generator of the stubs needs an older protobuf than everything else.
.venv-proto/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) --upgrade 'pip>=25.1'
	$(@D)/$(INSTALL) --group proto
	touch $@

# Third-party clients. perf_analyzer goes to a separate folder, without its dependencies.
.venv-interop/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) --upgrade 'pip>=25.1'
	$(@D)/$(INSTALL) --group interop
	$(@D)/$(INSTALL) --no-deps --target $(@D)/perf-analyzer --upgrade --group perf-analyzer
	touch $@
