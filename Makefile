# usage: make help
SHELL := bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# A name on the command line that is mistyped, or that no target of the call reads, is refused: make itself takes any.
given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
mistyped := $(if $(given),$(shell python3 scripts/settings.py names $(given) --goals $(or $(MAKECMDGOALS),help)))
$(if $(mistyped),$(error $(mistyped)))

# Settings: .env and the defaults of .env.example, checked. The command line and the environment win over both.
# The targets that need none are spared the check: a broken .env must not keep anyone from stopping a step.
WITHOUT_SETTINGS := help quickstart doctor test lint gpu gpu-watch status logs stop
ifneq ($(filter-out $(WITHOUT_SETTINGS),$(or $(MAKECMDGOALS),help)),)
include .cache/env.mk
endif
.cache/env.mk: FORCE
	@mkdir -p .cache && python3 scripts/settings.py make > $@.new && { cmp -s $@.new $@ || cp $@.new $@; } \
	  || { status=$$?; : > $@; exit $$status; } # an old one would hide a .env that is mended
FORCE:

# $(call need,KEY KEY) expands to nothing, or refuses the target while a setting has no value.
where = $(if $(wildcard .env),Set it in .env,There is no .env yet: cp .env.example .env)
need = $(foreach key,$(1),$(if $($(key)),,$(error $@ needs $(key). $(where), or run: make $@ $(key)=...)))

# $(call step,ENVIRONMENT) runs what follows it as the step named like the target, with that environment's programs.
step = python3 scripts/run_step.py run $@ $(if $(1),$(call need,ENVS_DIR)--env "$$ENVS_DIR/$(1)") --

# What QWEN_EVAL_MODEL loads.
qwen_base = $(call need,QWEN_MODEL_DIR)--model_name_or_path "$$QWEN_MODEL_DIR" --load_in_4bit
qwen_adapter = $(qwen_base) $(call need,QWEN_ADAPTER_DIR)--adapter_name_or_path "$$QWEN_ADAPTER_DIR"
qwen_merged = $(call need,QWEN_MERGED_DIR)--model_name_or_path "$$QWEN_MERGED_DIR"
wrong_model = $(error QWEN_EVAL_MODEL must be base, adapter or merged, got: $(QWEN_EVAL_MODEL))
qwen_model = $(or $(qwen_$(QWEN_EVAL_MODEL)),$(wrong_model))
# Where qwen-eval writes: a file for each model, so that none overwrites another's, unless make's command line names it
# (the environment does not: whoever has read .env into a shell would write all models' results into one file).
qwen_result_base = $$QWEN_BASE_RESULT_FILE
qwen_result_adapter = $$QWEN_RESULT_FILE
qwen_result_merged = $${QWEN_RESULT_FILE%.csv}_merged.csv
qwen_named = $(if $(filter base,$(QWEN_EVAL_MODEL)),$(filter command,$(origin QWEN_BASE_RESULT_FILE)))
qwen_one_for_all = $(if $(qwen_named),,$(filter command,$(origin QWEN_RESULT_FILE)))
qwen_result = $(qwen_result_$(if $(qwen_one_for_all),adapter,$(QWEN_EVAL_MODEL)))

# How many cards baichuan-train takes: those of HOSTFILE's machines, or of this one.
comma := ,
llm_python = p='$(ENVS_DIR)/llm_env/bin/python'; [ -x "$$p" ] || p=python3; "$$p"
hosts_cards = $(or $(shell $(llm_python) -m finetune.hosts --count '$(HOSTFILE)'),$(error $@ needs the machines of HOSTFILE))
baichuan_cards = $(if $(HOSTFILE),$(hosts_cards),$(words $(subst $(comma), ,$(BAICHUAN_GPUS))))

# A $ in a question is a dollar, not the beginning of a variable of make.
ifdef QUESTION
override QUESTION := $(value QUESTION)
export QUESTION
endif

##@ Start
.PHONY: help
help: ## show this text
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {print "\n" substr($$0, 5)} /^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2} /^## / {print substr($$0, 4)}' Makefile

.PHONY: quickstart
quickstart: ## the whole path with a tiny model on this machine: install, train, evaluate, merge, compare
	@$(call step) python3 scripts/quickstart.py $(ARGS)

.PHONY: doctor
doctor: ## check card, driver, memory, disk, Python and settings, and say what to do (NET=1: the hub too)
	@$(call step) python3 scripts/doctor.py $(if $(filter 1,$(NET)),--net) $(ARGS)

.PHONY: config
config: ## every setting, its value and where it came from
	@python3 scripts/settings.py config $(foreach key,$(SETTINGS),"$(key)=$(origin $(key))")

.PHONY: test
test: ## run the tests (ARGS="tests/test_settings.py" for some of them)
	@$(call step) bash scripts/test.sh $(ARGS)

.PHONY: lint
lint: ## check the style of Python and shell files
	@$(call step) bash scripts/lint.sh

##@ Box
.PHONY: instance
instance: ## [3] prepare a rented box: directories, net-tools, vim's encodings
	@$(call need,BASE_MODEL_DIR ENVS_DIR QWEN_OUTPUT_DIR)$(call step) python3 scripts/instance.py $(ARGS)

.PHONY: modelscope-env
modelscope-env: ## [4-5] create modelscope_env, the environment of the downloads
	@$(call need,ENVS_DIR)$(call step) python3 scripts/environment.py modelscope_env $(ARGS)

.PHONY: tunnel
tunnel: ## [19] on your own computer: the box's page and service on 127.0.0.1 (ARGS=--print for the Windows line)
	@$(call need,TUNNEL_HOST TUNNEL_SSH_PORT TUNNEL_PORTS)$(call step) python3 scripts/tunnel.py $(ARGS)

.PHONY: gpu
gpu: ## [11] show the cards and their memory
	@$(call step) python3 scripts/nvidia.py show

.PHONY: gpu-watch
gpu-watch: ## [12] show them every second
	@$(call step) python3 scripts/nvidia.py watch

.PHONY: status
status: ## what runs in the background, since when, at what cost (STEP=qwen-train for one step)
	@python3 scripts/run_step.py status $(STEP)

.PHONY: logs
logs: ## [13] a step's log; on a terminal it is followed (STEP=qwen-train, FOLLOW=0)
	@python3 scripts/run_step.py logs $(STEP) $(if $(filter 0,$(FOLLOW)),--print)

.PHONY: stop
stop: ## end a step with SIGTERM and wait for it (STEP=qwen-train; TIMEOUT=60 kills it after a minute)
	@python3 scripts/run_step.py stop $(STEP) $(if $(TIMEOUT),--timeout $(TIMEOUT))

##@ Project 1, qwen_qlora: QLoRA of Qwen-14B-Chat on one 48 GB card
.PHONY: qwen-env
qwen-env: ## [7-8] create qwen_env, the environment of the other steps
	@$(call need,ENVS_DIR)$(call step) python3 scripts/environment.py qwen_env $(ARGS)

.PHONY: qwen-download
qwen-download: ## [6] download the base model and convert it to a current layout
	@$(call need,BASE_MODEL_DIR QWEN_MODEL_ID QWEN_MODEL_REVISION QWEN_MODEL_DIR)$(call step,modelscope_env) python -m qwen_qlora.qwen_download \
	  --model_id "$$QWEN_MODEL_ID" --revision "$$QWEN_MODEL_REVISION" --source "$$SOURCE" \
	  --download_dir "$$BASE_MODEL_DIR" --model_dir "$$QWEN_MODEL_DIR" --keep_original "$$KEEP_ORIGINAL" $(ARGS)

.PHONY: qwen-data
qwen-data: ## [9] check the rows: lengths, cuts, duplicates, overlap of training and test
	@$(call need,QWEN_MODEL_DIR)$(call step,qwen_env) python -m finetune.data_report --model_dir "$$QWEN_MODEL_DIR" \
	  --train_file "$$QWEN_TRAIN_FILE" --test_file "$$QWEN_TEST_FILE" \
	  --train_args_file "$$QWEN_TRAIN_CONFIG" $(ARGS)

.PHONY: qwen-plan
qwen-plan: ## [9] memory, time and money of a training run, also for cards not rented yet (GPU=A100-80G GPUS=2)
	@$(call step,$(if $(wildcard $(ENVS_DIR)/qwen_env),qwen_env)) python3 -m finetune.plan --method qlora \
	  --train_args_file "$$QWEN_TRAIN_CONFIG" --model "$${QWEN_MODEL_DIR:-$$QWEN_MODEL_ID}" \
	  --train_file "$$QWEN_TRAIN_FILE" $${QWEN_OUTPUT_DIR:+--output_dir "$$QWEN_OUTPUT_DIR"} \
	  $(if $(GPU),--gpu "$(GPU)") $(if $(GPUS),--num_gpus "$(GPUS)") $(ARGS)

.PHONY: qwen-train
qwen-train: ## [9-10] train the adapter (BG=1 detaches it; ARGS="--learning_rate 1e-4" overrides the JSON)
	@$(call need,QWEN_MODEL_DIR QWEN_OUTPUT_DIR)bash qwen_qlora/train_qwen_qlora.sh $(ARGS)

.PHONY: qwen-eval
qwen-eval: ## [14] answer the 500 test rows, write gold and predicted answers and metrics
	@$(call step,qwen_env) python -m qwen_qlora.evaluation.model_evaluation $(qwen_model) \
	  --test_file "$$QWEN_TEST_FILE" --result_file "$(qwen_result)" --mode "$$QWEN_EVAL_MODE" \
	  $(if $(QWEN_EVAL_LIMIT),--limit "$$QWEN_EVAL_LIMIT") $(ARGS)

.PHONY: qwen-merge
qwen-merge: ## [note 23] merge the adapter into a 16-bit model
	@$(call need,QWEN_MODEL_DIR QWEN_ADAPTER_DIR QWEN_MERGED_DIR)$(call step,qwen_env) python -m qwen_qlora.utils.merge_lora \
	  --model_name_or_path "$$QWEN_MODEL_DIR" --adapter_name_or_path "$$QWEN_ADAPTER_DIR" --save_path "$$QWEN_MERGED_DIR" $(ARGS)

.PHONY: qwen-chat
qwen-chat: ## talk to the model in the terminal
	@$(call step,qwen_env) python -m finetune.chat $(qwen_model) $(ARGS)

##@ Project 2, llm_code: all parameters of Baichuan2-7B-Chat on 80 GB cards
.PHONY: baichuan-env
baichuan-env: ## [7-8] create llm_env, the environment of the steps from training on
	@$(call need,ENVS_DIR)$(call step) python3 scripts/environment.py llm_env $(ARGS)

.PHONY: baichuan-download
baichuan-download: ## [6] download the base model and convert it to a current layout
	@$(call need,BASE_MODEL_DIR BAICHUAN_MODEL_ID BAICHUAN_MODEL_REVISION BAICHUAN_MODEL_DIR)$(call step,modelscope_env) \
	  python -m llm_code.llm_download.baichuan2_7B_base_download \
	  --model_id "$$BAICHUAN_MODEL_ID" --revision "$$BAICHUAN_MODEL_REVISION" --source "$$SOURCE" \
	  --download_dir "$$BASE_MODEL_DIR" --model_dir "$$BAICHUAN_MODEL_DIR" --keep_original "$$KEEP_ORIGINAL" $(ARGS)

.PHONY: baichuan-data
baichuan-data: ## [9] check the rows: lengths, cuts, duplicates, overlap of training and test
	@$(call need,BAICHUAN_MODEL_DIR)$(call step,llm_env) python -m finetune.data_report --model_dir "$$BAICHUAN_MODEL_DIR" \
	  --train_file "$$BAICHUAN_TRAIN_FILE" --test_file "$$BAICHUAN_TEST_FILE" \
	  --train_args_file "$$BAICHUAN_TRAIN_CONFIG" $(ARGS)

.PHONY: baichuan-plan
baichuan-plan: ## [9] memory, time and money by DeepSpeed stage and number of cards (GPU=A100-80G GPUS=2)
	@$(call step,$(if $(wildcard $(ENVS_DIR)/llm_env),llm_env)) python3 -m finetune.plan --method full \
	  --train_args_file "$$BAICHUAN_TRAIN_CONFIG" --model "$${BAICHUAN_MODEL_DIR:-$$BAICHUAN_MODEL_ID}" \
	  --train_file "$$BAICHUAN_TRAIN_FILE" $${BAICHUAN_OUTPUT_DIR:+--output_dir "$$BAICHUAN_OUTPUT_DIR"} \
	  $(if $(GPU),--gpu "$(GPU)") --num_gpus "$(or $(GPUS),$(baichuan_cards))" $(ARGS)

.PHONY: baichuan-train
baichuan-train: ## [10-11] train all parameters (BG=1 detaches it; ARGS="--num_train_epochs 1" overrides the JSON)
	@$(call need,BAICHUAN_MODEL_DIR BAICHUAN_OUTPUT_DIR)bash llm_code/train_ft.sh $(ARGS)

.PHONY: baichuan-finalize
baichuan-finalize: ## [14] make final/ complete and check it (ARGS="--checkpoint DIR" takes another checkpoint)
	@$(call need,BAICHUAN_MODEL_DIR BAICHUAN_OUTPUT_DIR)$(call step,llm_env) python -m llm_code.finalize \
	  --model_name_or_path "$$BAICHUAN_MODEL_DIR" --output_dir "$$BAICHUAN_OUTPUT_DIR" $(ARGS)

.PHONY: baichuan-demo
baichuan-demo: ## [17] talk to the fine-tuned model in the terminal
	@$(call need,LLM_MODULE_MODEL_PATH)$(call step,llm_env) python -m llm_code.llm_demo.baichuan2_demo \
	  --model_name_or_path "$$LLM_MODULE_MODEL_PATH" --engine "$${ENGINE:-local}" \
	  $${UPSTREAM_URL:+--upstream_url "$$UPSTREAM_URL"} $(ARGS)

.PHONY: baichuan-serve
baichuan-serve: ## [18] serve the model on 127.0.0.1: OpenAI's protocol at /v1, and /internal/ask
	@$(call need,ENVS_DIR LLM_MODULE_MODEL_PATH)bash llm_code/service/server.sh $(ARGS)

.PHONY: baichuan-client
baichuan-client: ## [19] ask the service (QUESTION=..., or FILE=questions.txt, or a conversation)
	@$(call step,llm_env) python -m llm_code.service.client --url "http://127.0.0.1:$${BAICHUAN_PORT:-10820}" \
	  $(if $(QUESTION),--question "$$QUESTION") $(if $(FILE),--file "$$FILE") $(ARGS)

.PHONY: baichuan-web
baichuan-web: ## [19] the chat page on 127.0.0.1:17860, in front of the service (BG=1 detaches it)
	@$(call need,ENVS_DIR)bash llm_code/web_framework/web_service.sh $(ARGS)

.PHONY: bench-serve
bench-serve: ## measure the engine against transformers, on a CPU with SmolLM2 or with ARGS=--gpu on the card
	@$(call need,ENVS_DIR)$(call step,llm_env) python -m benchmarks.bench_serve $(ARGS)

##@ Speed of either project's training
.PHONY: bench-train
bench-train: ## measure training against others on the same rows, on the card or a CPU (ARGS="--only qlora --rounds 3")
	@$(call step,qwen_env) python -m benchmarks.bench_train $(ARGS)

##@ Evaluation of either project's models
.PHONY: mmcu-download
mmcu-download: ## [20] fetch MMCU's workbooks (or take a folder that has them), and count them
	@$(call need,MMCU_DATA_DIR)$(call step,modelscope_env) python -m llm_code.llm_evaluation.mmcu_download --dataset_id "$$MMCU_DATASET_ID" \
	  --revision "$$MMCU_DATASET_REVISION" --source "$$MMCU_SOURCE" --data_dir "$$MMCU_DATA_DIR" $(ARGS)

.PHONY: baichuan-eval-mmcu
baichuan-eval-mmcu: ## [20] MMCU: Chinese multiple-choice questions in four domains (LIMIT=500 for some of them)
	@$(call need,ENVS_DIR MMCU_DATA_DIR)bash llm_code/llm_evaluation/mmcu.sh $(if $(LIMIT),--limit "$(LIMIT)") $(ARGS)

.PHONY: baichuan-eval-bleu
baichuan-eval-bleu: ## [21] answer the psychology questions and score the answers with BLEU (LIMIT=50 for some)
	@$(call need,ENVS_DIR)bash llm_code/llm_evaluation/bleu.sh $(if $(LIMIT),--limit "$(LIMIT)") $(ARGS)

.PHONY: qwen-eval-mmcu
qwen-eval-mmcu: ## MMCU on the model that QWEN_EVAL_MODEL names: what did it forget?
	@$(call need,MMCU_DATA_DIR)$(call step,qwen_env) python -m llm_code.llm_evaluation.mmcu $(qwen_model) --answer "$$EVAL_ANSWER" \
	  --data_dir "$$MMCU_DATA_DIR" --ntrain "$$MMCU_NTRAIN" --save_dir "$$EVAL_RESULT_DIR/qwen_mmcu_$$QWEN_EVAL_MODEL" \
	  $(if $(LIMIT),--limit "$(LIMIT)") $(ARGS)

.PHONY: qwen-report
qwen-report: ## one page about the adapter: training, scores before and after, samples, contamination
	@$(call need,QWEN_OUTPUT_DIR)$(call step,qwen_env) python -m finetune.before_after \
	  --train_dir "$$QWEN_OUTPUT_DIR" --train_file "$$QWEN_TRAIN_FILE" --output_dir "$$EVAL_RESULT_DIR/qwen_report" \
	  --score "test rows" "$${QWEN_BASE_RESULT_FILE%.csv}.jsonl" "$${QWEN_RESULT_FILE%.csv}.jsonl" \
	  --score "MMCU strict" "$$EVAL_RESULT_DIR/qwen_mmcu_base/answers.jsonl" "$$EVAL_RESULT_DIR/qwen_mmcu_adapter/answers.jsonl" $(ARGS)

.PHONY: baichuan-report
baichuan-report: ## one page about the fine-tuned model: training, scores before and after, samples, contamination
	@$(call need,BAICHUAN_OUTPUT_DIR)$(call step,llm_env) python -m finetune.before_after \
	  --train_dir "$$BAICHUAN_OUTPUT_DIR" --train_file "$$BAICHUAN_TRAIN_FILE" --output_dir "$$EVAL_RESULT_DIR/baichuan_report" \
	  --score BLEU "$$EVAL_RESULT_DIR/bleu/psychology_result_bleu_base.jsonl" "$$EVAL_RESULT_DIR/bleu/psychology_result_bleu.jsonl" \
	  --score "MMCU strict" "$$EVAL_RESULT_DIR/mmcu_base/answers.jsonl" "$$EVAL_RESULT_DIR/mmcu/answers.jsonl" $(ARGS)

##
## [n] is the step of the walkthrough. BG=1 detaches any step (it survives the SSH session, log in logs/<step>.log),
## DRY_RUN=1 prints its command and does nothing. A setting is overridden by make <step> KEY=value.
