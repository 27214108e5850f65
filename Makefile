# make demo: install, train on handwritten digits, draw and measure.   make test: install, then the tests.
# make page: a page that draws with the pretrained model, in the browser.
# make check: lint, numbers, operators and a tiny run, in under a minute on two cores.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE
RUN := workdir/digits_T_flow/default
comma := ,
NEWEST = $$(ls -d $(RUN)/ckpts/*.ckpt | sort -V | tail -n 1)

CHECKS := tests/test_road.py $(wildcard tests/test_golden_*.py) tests/test_regression.py tests/test_ops.py tests/test_rooms.py

.PHONY: demo page check test test-slow test-gpu test-page clean-demo

demo: .venv/installed assets/digits_classifier.safetensors
	$(BIN)/python train.py --config=configs/digits_T_flow.py
	$(BIN)/python sample.py --nnet_path=$(NEWEST) --n=10 --out=$(RUN)/digits.png
	$(BIN)/python eval.py --config=configs/digits_T_flow.py --nnet_path=$(NEWEST)
	@echo "the picture, a row for each digit, is $(RUN)/digits.png"

page: .venv-page/installed
	.venv-page/bin/python app.py

check: .venv/installed-tests
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile $(CHECKS)

test: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test-slow: .venv/installed-slow
	$(BIN)/python -m pytest -q -m slow

test-page: .venv/installed-tests .venv-page/installed
	.venv-page/bin/python -m pytest -q tests/page --durations=5

# With the machine's own Python and packages; COMMIT=... where there is no git.
test-gpu:
	$(PYTHON) tests/gpu_record.py

assets/digits_classifier.safetensors: scripts/train_classifier.py libs/evaluate/features.py | .venv/installed
	$(BIN)/python scripts/train_classifier.py --dataset=digits --epochs=10 --out=$@

# Stamps: pip runs again only if the list of packages changed.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the packages of pyproject.toml into .venv, two minutes or so and 6 GB"
	$(BIN)/python -m pip install --disable-pip-version-check -q -e "$(1)"
	touch $@
endef

.venv/installed: pyproject.toml setup.py
	$(call install,.)

.venv/installed-tests: pyproject.toml setup.py
	$(call install,.[test])
	touch .venv/installed

.venv/installed-slow: .venv/installed-tests
	$(call install,.[test$(comma)deepspeed])

# Gradio wants an older Pillow: an environment of its own, which finds all else in .venv.
.venv-page/installed: .venv/installed
	test -x .venv-page/bin/python || $(BIN)/python -m venv .venv-page
	realpath .venv/lib/python*/site-packages > $$(echo .venv-page/lib/python*/site-packages)/venv.pth
	@echo "installing gradio into .venv-page, half a minute or so"
	.venv-page/bin/python -m pip install --disable-pip-version-check -q -e ".[page]"
	touch $@

clean-demo:
	rm -rf $(RUN)
