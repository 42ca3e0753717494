# autoprune: `make help` lists the targets. Each is one line; `.venv` is made on first use.

.DEFAULT_GOAL := help
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' Makefile)
.DELETE_ON_ERROR:

SPACE ?=
TRIALS ?=
WORKERS ?=
HOURS ?=
NAME ?=
TRIAL ?=
FORMAT ?= safetensors
PICK ?= --knee
EPOCHS ?= 20
PORT ?= 8080
PRIORITY ?=
SLOTS ?=
BENCH ?=
PYTHON ?= python3
export AUTOPRUNE_DATA ?= $(or $(wildcard ../shared/data),data)

RUN := .venv/bin/autoprune
READY := .venv/.installed

help: ## list the targets and their variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

search: $(READY) ## search for a front: SPACE= TRIALS= WORKERS= HOURS= NAME= (run again, it resumes)
	OMP_WAIT_POLICY=PASSIVE $(RUN) search $(SPACE) $(if $(TRIALS),--trials $(TRIALS)) $(if $(WORKERS),--workers $(WORKERS)) $(if $(HOURS),--timeout $(HOURS)h) $(if $(NAME),--name $(NAME))

inspect: $(READY) ## show the pruning groups and costs of a space's model: SPACE=
	@$(RUN) inspect $(SPACE)

latency: $(READY) ## measure the latency table of a space's model on this device: SPACE=
	@$(RUN) latency $(SPACE)

profile: $(READY) ## show where the time of a trial goes, beside its passes alone: SPACE=
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN) profile $(SPACE)

validate: $(READY) ## check a space file: SPACE=
	@$(RUN) validate $(SPACE)

front: $(READY) ## show the front that a search has found: NAME=
	@$(RUN) front $(or $(NAME),digits-resnet20)

report: $(READY) ## write everything about a search into one HTML file: NAME=
	@$(RUN) report $(or $(NAME),digits-resnet20)

pick: $(READY) ## pick a model of the front: NAME= PICK="--knee" or "--trial 6" or "--max-macs 0.3"
	$(RUN) pick $(or $(NAME),digits-resnet20) $(PICK)

export: $(READY) ## write the picked model, or TRIAL=, to exports/: NAME= TRIAL= FORMAT=safetensors|pt2|onnx|all
	$(RUN) export $(or $(NAME),digits-resnet20) $(if $(TRIAL),--trial $(TRIAL)) --format $(FORMAT)

finetune: $(READY) ## train the picked model longer: NAME= or NAME=name@knee, EPOCHS=20
	OMP_WAIT_POLICY=PASSIVE $(RUN) finetune $(or $(NAME),digits-resnet20) --epochs $(EPOCHS)

reproduce: $(READY) ## evaluate the trial of an MLflow run again and compare: RUN=id
	OMP_WAIT_POLICY=PASSIVE .venv/bin/autoprune reproduce $(if $(filter command,$(origin RUN)),$(RUN),$(error name a run of MLflow: make reproduce RUN=id))

sync: $(READY) ## record in MLflow what it does not hold yet: NAME=
	$(RUN) sync $(or $(NAME),digits-resnet20)

schema: $(READY) ## print the JSON Schema of space files, for editors
	@$(RUN) schema

dashboard: $(READY) ## Optuna dashboard on 127.0.0.1: PORT=8080
	$(RUN) dashboard --port $(PORT)

serve: $(READY) ## run the queue, the MLflow server and the Optuna dashboard until Ctrl-C: SLOTS=1
	OMP_WAIT_POLICY=PASSIVE $(RUN) serve $(if $(SLOTS),--slots $(SLOTS))

submit: $(READY) ## add a search to the queue of `make serve`: SPACE= TRIALS= WORKERS= HOURS= NAME= PRIORITY=0
	@$(RUN) submit $(SPACE) $(if $(PRIORITY),--priority $(PRIORITY)) $(if $(TRIALS),--trials $(TRIALS)) $(if $(WORKERS),--workers $(WORKERS)) $(if $(HOURS),--timeout $(HOURS)h) $(if $(NAME),--name $(NAME))

status: $(READY) ## show the searches, the queue and the service: NAME=
	@$(RUN) status $(NAME)

mlflow-ui: $(READY) ## MLflow UI on 127.0.0.1:5000, as mlflow/server.env says
	$(RUN) mlflow-ui

techniques: $(READY) ## compare pruning techniques side by side: tests/benchmarks/results/techniques.md (10 to 20 minutes)
	OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/techniques.py --output tests/benchmarks/results/techniques.md

samplers: $(READY) ## compare samplers on a surrogate that costs no network (5 minutes of one core; hours with BENCH=--whole)
	OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/samplers.py --journal .autoprune/samplers.jsonl --output tests/benchmarks/results/samplers.md $(BENCH)

compensation: $(READY) ## compare ways of repairing ResNet-20 (15 minutes of one core; resumes; needs AUTOPRUNE_DATA)
	OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/compensation.py --journal .autoprune/compensation.json --output tests/benchmarks/results/compensation.md $(BENCH)

recipes: $(READY) ## compare recipes on ResNet-20 (10 minutes of one core; resumes; needs AUTOPRUNE_DATA)
	OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/recipes.py --journal .autoprune/recipes.json --output tests/benchmarks/results/recipes.md $(BENCH)

test: $(READY) ## run the default tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-all: $(READY) ## run all tests, the slow ones included
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -q

coverage: $(READY) ## every torchvision and 100 timm models, beside Torch-Pruning; resumes: MODELS=glob ARGS=--skip-onnx
	nice .venv/bin/python tests/benchmarks/coverage.py --resume $(if $(MODELS),--models '$(MODELS)') $(ARGS)

bench: $(READY) ## compare fronts with the peers' (hours; needs AUTOPRUNE_DATA): BENCH="--seeds 1 --networks resnet20"
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python tests/benchmarks/bench/run.py $(BENCH)

chaos: $(READY) ## kill a search's processes 50 times at random and count what is lost (20 minutes; needs PostgreSQL)
	.venv/bin/python tests/benchmarks/chaos.py --seeds 1 2 --output tests/benchmarks/results/chaos.md

storage-cost: $(READY) ## what a trial costs the coordinator at 100 to 5,000 trials, on SQLite and PostgreSQL
	OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/storage_cost.py --output tests/benchmarks/results/storage-cost.md

busy-workers: $(READY) ## how busy one coordinator keeps 64 workers of 1-second trials
	OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/busy_workers.py --output tests/benchmarks/results/busy-workers.md

bench-quick: $(READY) ## the same for ResNet-20, one seed, in under 15 minutes
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python tests/benchmarks/bench/run.py --quick $(BENCH)

bench-speed: $(READY) ## how near trials come to their bare passes: on the GPU where there is one: BENCH="--device cpu" (needs AUTOPRUNE_DATA)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python tests/benchmarks/speed.py $(BENCH)

bench-preparation: $(READY) ## what ResNet-50 and ViT-B/16 at 224 px cost before the first candidate: tests/benchmarks/results/preparation.md
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python tests/benchmarks/preparation.py $(BENCH)

bench-memory: $(READY) ## the most memory that a search of ResNet-50 at 224 px, batch 64, holds (about ten minutes)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python tests/benchmarks/memory.py $(BENCH)

check: $(READY) ## lint, format, types and import rules
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/python -m pytest -q tests/unit/test_architecture.py

format: $(READY) ## format the code and sort its imports
	.venv/bin/ruff check --fix . ; .venv/bin/ruff format .

clean: ## remove caches and builds; searches (.autoprune) and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis && find autoprune tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv && .venv/bin/python -m pip install -q -e '.[onnx,timm,postgres,dev]' && touch $@
