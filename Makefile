# Everything runs from .venv, made on first use: with uv when it is there, else with pip.
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)
SETUP := .venv/.installed

# Where Python may keep no compiled files, each of some thirty processes would compile torch anew: 4 s or more.
demo test quick truth test-oldest: export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test quick lint types docs truth gpu test-oldest clean

$(SETUP): setup.cfg pyproject.toml constraints.txt
ifeq ($(UV),)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip uv
	VIRTUAL_ENV=.venv $(BIN)/uv pip install -q -c constraints.txt -e '.[dev,torchattacks,timm]'
else
	test -x $(BIN)/python || uv venv -q --python $(PYTHON) .venv
	VIRTUAL_ENV=.venv uv pip install -q -c constraints.txt -e '.[dev,torchattacks,timm]'
endif
	touch $@

demo: $(SETUP)
	$(BIN)/robench demo

# Two workers of one thread each: the models are too small for more.
test: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# While you work: all but the files marked slow, which take half of the time with a twelfth of the tests.
quick: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not truth and not slow"

# The authors' published weights and real CIFAR-10 images, in full (needs ../shared/data or $$ROBENCH_DATA).
truth: $(SETUP)
	$(BIN)/python -m pytest -m truth --timeout 3600 -rs -s

# Everything that a GPU must show, in twelve minutes (docs/gpu.md).
gpu: $(SETUP)
	$(BIN)/python benchmarks/gpu.py

# The lower bounds of setup.cfg, in an environment of their own (needs uv).
test-oldest:
	uv venv -q --clear --python $(PYTHON) build/oldest
	VIRTUAL_ENV=build/oldest uv pip install -q --resolution lowest-direct -e '.[dev]'
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest -n 2 --dist loadfile

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads the built tree: the editable mapping of attacks/ to robench.attacks is invisible to it.
types: $(SETUP)
	rm -rf build/lib build/typed && mkdir -p build/typed
	$(BIN)/python -c "import shutil,sys; sys.exit(0 if shutil.which('uv') else 1)" \
	  && VIRTUAL_ENV=.venv uv pip install -q --no-deps --target build/typed . \
	  || VIRTUAL_ENV=.venv $(BIN)/uv pip install -q --no-deps --target build/typed .
	mkdir build/typed/benchmarks && cp -r benchmarks/speed build/typed/benchmarks
	cd build/typed && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../setup.cfg -p robench -p benchmarks.speed

# The site, in site/: `python -m http.server -d site` shows it. An environment of its own, as torchattacks pins an old
# requests; the API pages are read from the built tree, without torch. The last line: it loads nothing from elsewhere.
docs: private UV := $(or $(UV),$(BIN)/uv)
docs: $(SETUP)
	$(UV) venv -q --clear --python $(BIN)/python build/docs
	$(BIN)/python -c "import configparser as c; p = c.ConfigParser(); p.read('setup.cfg'); \
	  print(p['options.extras_require']['docs'])" > build/docs.txt
	VIRTUAL_ENV=build/docs $(UV) pip install -q -c constraints.txt -r build/docs.txt
	rm -rf build/documented
	VIRTUAL_ENV=.venv $(UV) pip install -q --no-deps --target build/documented .
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build -q
	! grep -rE '<(script|link|img|iframe|source)[^>]*["= ](https?:)?//|url\(["'"'"']?(https?:)?//' site \
	  --include=*.html --include=*.css

clean:
	rm -rf .venv build dist demo site
