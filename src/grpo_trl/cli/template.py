"""The configuration that `grpo-trl init` writes."""

TEMPLATE = """\
# Run it:         grpo-trl train {file}
# What it costs:  grpo-trl plan {file} --gpu H100
# Any option of GRPOConfig may stand here, and on the command line: --learning_rate 2e-6. All of them: docs/options.md

# The model: a hub name or a path
model_name_or_path: {model}
# use_peft: true                    # train a LoRA adapter instead of all weights
# lora_target_modules: all-linear

# The data: a hub name, a folder, or a file (jsonl, csv, parquet)
dataset_name: {dataset}
{config}dataset_train_split: train
prompt_template: "{{question}}"       # columns of the dataset
system_prompt: Solve the problem step by step, and end with a line of the form '#### 24' that holds the final number alone.

# Evaluation: samples and rewards held-out problems, here the first 100; grpo-trl report shows what changed in them
# eval_strategy: steps
# eval_steps: 50
# eval_on_start: true
# dataset_test_split: test[:100]
# num_generations_eval: 1

# The rewards: ready-made (docs/rewards.md), or a dotted path to a function of yours, e.g. my_rewards.correct
reward_funcs:
  - gsm8k_answer
  - length_penalty
reward_weights: [1.0, 0.1]

# The objective: token (DeepSeekMath) or sequence (DeepSeek-V2 and V3)
loss_level: token
beta: 0.0                           # above 0: a KL term to the reference

# A group is one prompt and its completions; a step trains on 8 x 8 = 64 completions of 8 prompts
num_generations: 8
per_device_train_batch_size: 8
gradient_accumulation_steps: 8
max_completion_length: 512
learning_rate: 1.0e-6
max_steps: 200

# What is kept
output_dir: {output}
logging_steps: 1
save_steps: 50
save_total_limit: 2
report_to: none                     # or tensorboard, wandb, trackio
resume_from_checkpoint: true        # a second start resumes where the first one ended
"""


def configuration(file: str, model: str, dataset: str, output: str) -> str:
    """Fill the template in."""
    config = "dataset_config: main\n" if dataset == "openai/gsm8k" else ""
    return TEMPLATE.format(file=file, model=model, dataset=dataset, config=config, output=output)
