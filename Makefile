# Two commands set up everything: `make toy` runs the main job on this machine, `make test` the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHARDS := shards/toy
export OMP_NUM_THREADS ?= 1

# One rank a GPU where there are GPUs, in a number that divides the toy batch; else CPU ranks.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
ifeq ($(GPUS),0)
TOY_RANKS := 4
LEARN_RANKS := 2
else
TOY_RANKS := $(shell n=1; while [ $$((2 * n)) -le $(GPUS) ] && [ $$n -lt 8 ]; do n=$$((2 * n)); done; echo $$n)
LEARN_RANKS := 1
endif
# Pipeline and expert parallelism where the ranks divide by four.
TOY_LAYOUT := $(if $(filter 4 8,$(TOY_RANKS)),parallel.pp=2 parallel.ep=2)
DIGITS := read count
comma := ,
digit_shards = [$(subst $() ,$(comma),$(foreach task,$(DIGITS),$(SHARDS)/$(1)/$(task)-*.tar))]

# The encoder's own stages: how to start one, and how its encoder is scored on scans that were held out.
VIT = $(BIN)/torchrun --standalone --nproc-per-node $(TOY_RANKS) launch/pretrain.py scale=toy logger.every=100 \
	optim.min_lr=1e-5 run.dir=runs/$@ +recipe=$@
SCORE = $(BIN)/python launch/evaluate.py runs/$@ --data '$(SHARDS)/vision/heldout/digit-*.tar'
PROMPTS := --template 'a photo of the digit {}' --template 'a handwritten {}' --template 'the digit {} in ink'

# Files of tests run two at a time; then, alone, those that stop, kill and time processes.
SIDE_BY_SIDE := tests/data tests/parallel tests/train tests/reference tests/golden tests/distributed \
	tests/mutants tests/test_house.py tests/test_benchmark_gpu.py tests/test_benchmarks.py \
	$(patsubst %,tests/launch/test_%.py,bad_input checkpoint_command curate docs evaluate_encoder evaluate_settings \
	extending inspect_data make_teacher model_presets packaging precedence profile recipes)

.PHONY: toy learn hf vit_mim vit_contrastive vit_omni types check test soak mutants lint clean

# uv where it is installed: many times as fast as pip.  It finds wheels where pip is told to.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
INSTALL = $(if $(shell command -v uv),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install) -q -c constraints.txt

# What training runs with, and what draws toy shards.
$(VENV)/toy: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[toy]'
	touch $@

# And what tests, teachers and pictures need.
$(VENV)/installed: $(VENV)/toy
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps timm  # wants torchvision, which has no build for CPUs
	touch $@

$(SHARDS)/tokenizer.json: | $(VENV)/toy
	$(BIN)/python launch/make_shards.py $(SHARDS)

# The main job at toy size: stage 2 under pipeline and expert parallelism on four ranks.
toy: $(VENV)/toy $(SHARDS)/tokenizer.json
	rm -rf runs/toy
	$(BIN)/torchrun --standalone --nproc-per-node $(TOY_RANKS) launch/pretrain.py +recipe=stage2 scale=toy \
		$(TOY_LAYOUT) run.dir=runs/toy optim.lr=1e-3

# Stage 1 from scratch on the digit tasks, then exact match on held-out scans and a picture of the curve.
learn: $(VENV)/installed $(SHARDS)/tokenizer.json
	rm -rf runs/learn
	$(BIN)/torchrun --standalone --nproc-per-node $(LEARN_RANKS) launch/pretrain.py +recipe=stage1 scale=toy \
		run.dir=runs/learn 'data.sources.main.shards=$(call digit_shards,train)' train.steps=3500 train.micro_batch_size=4 \
		optim.lr=1e-3 optim.min_lr=1e-5 optim.warmup_steps=100 logger.every=100
	$(BIN)/python launch/evaluate.py runs/learn 'data.sources.main.shards=$(call digit_shards,heldout)' \
		--at-least 0.9 --exchanged-at-most 0.25
	$(BIN)/python launch/plot.py runs/learn

# A language model of random weights as transformers makes it.
define QWEN3_MOE
import torch, transformers
torch.manual_seed(0)
sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True)
config = transformers.Qwen3MoeConfig(vocab_size=384, initializer_range=0.06, **sizes, **experts)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained("$(SHARDS)/qwen3_moe")
endef
export QWEN3_MOE
$(SHARDS)/qwen3_moe/config.json: $(VENV)/installed $(SHARDS)/tokenizer.json
	$(BIN)/python -c "$$QWEN3_MOE"

# Out of transformers and back: its Qwen3-MoE and our encoder, the adapter first, then all of it under tensor and expert
# parallelism; the exported folder answers held-out digits in transformers as the checkpoint does here.
HF = $(BIN)/torchrun --standalone --nproc-per-node 2 launch/pretrain.py scale=toy parallel.tp=2 parallel.ep=2 \
	model.llm.folder=$(SHARDS)/qwen3_moe 'data.sources.main.shards=$(call digit_shards,train)' \
	train.micro_batch_size=8 optim.min_lr=1e-5 logger.every=100
hf: $(SHARDS)/qwen3_moe/config.json
	rm -rf runs/hf
	$(HF) +recipe=stage0 run.dir=runs/hf/stage0 train.steps=50 optim.lr=1e-3
	$(HF) +recipe=stage1 run.dir=runs/hf/stage1 checkpoint.load_from=runs/hf/stage0 train.steps=1500 \
		optim.lr=2e-3 optim.warmup_steps=100
	$(BIN)/python launch/checkpoint.py export runs/hf/stage1 runs/hf/exported --format hf
	$(BIN)/python launch/evaluate.py runs/hf/stage1 'data.sources.main.shards=$(call digit_shards,heldout)' \
		--exported runs/hf/exported --at-least 0.5

$(SHARDS)/teacher/config.json: $(VENV)/installed $(SHARDS)/tokenizer.json
	$(BIN)/python launch/make_teacher.py $(SHARDS)/teacher

# The encoder from scratch, each stage from the last: features of masked patches, captions, then sound as well.
vit_mim: $(SHARDS)/teacher/config.json
	rm -rf runs/$@
	$(VIT) objective.teacher=$(SHARDS)/teacher train.steps=1000 optim.lr=2e-3 optim.warmup_steps=50
	$(SCORE) --train '$(SHARDS)/vision/train/digit-*.tar'
	$(BIN)/python launch/plot.py runs/$@

vit_contrastive: $(VENV)/installed
	rm -rf runs/$@
	$(VIT) optim=adamw checkpoint.load_from=runs/vit_mim train.steps=2000 optim.lr=3e-3 optim.warmup_steps=50
	$(SCORE) $(PROMPTS) --picture runs/$@/retrieval.png --at-least 0.92
	$(BIN)/python launch/plot.py runs/$@

vit_omni: $(VENV)/installed
	rm -rf runs/$@
	$(VIT) checkpoint.load_from=runs/vit_contrastive train.steps=500 optim.lr=3e-4 optim.warmup_steps=20 \
		optim.layer_decay=0.5 objective.omni.bias_init=-4
	$(SCORE) $(PROMPTS) --at-least 0.92
	$(BIN)/python launch/plot.py runs/$@

test: types
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile $(SIDE_BY_SIDE); side=$$?; \
		$(BIN)/python -m pytest tests $(addprefix --ignore=,$(SIDE_BY_SIDE)) && exit $$side

# The folders under the name that tandem.py gives them, which mypy looks for as a folder.
types: $(VENV)/installed
	mkdir -p build/types && ln -sfn ../.. build/types/tandem
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml

# Types, format, floors of the house, and tests of pure functions; under a minute.
FAST := tests/test_house.py $(patsubst %,tests/train/test_%.py,tasks schedule guards history retention masking memory) \
	$(patsubst %,tests/parallel/test_%.py,layout balance routes state) \
	$(patsubst %,tests/data/test_%.py,mixture packing order image) \
	$(patsubst %,tests/launch/test_%.py,recipes precedence docs)
check: types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile $(FAST)

# Kills ranks at random moments, hundreds of times, and compares with a run without faults; up to an hour.  Then the
# commands of the README, and a tenth of the mutations, drawn by the date.
soak: $(VENV)/installed
	$(BIN)/python -m tests.faults.soak
	$(BIN)/python -m tests.launch.readme
	$(BIN)/python -m tests.mutants --tenth today

# Applies one deliberate mistake at a time and runs the tests that are meant to notice it; up to 40 minutes.
mutants: $(VENV)/installed
	$(BIN)/python -m tests.mutants

lint: $(VENV)/installed
	$(BIN)/python -m ruff check --fix . && $(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) $(SHARDS) runs/toy runs/learn runs/hf runs/vit_mim runs/vit_contrastive runs/vit_omni runs/soak *.egg-info
