"""GRPO on a laptop: a tiny model learns to solve word problems, in a minute or two on two CPU cores.

    python examples/quickstart.py
    python examples/quickstart.py --loss_level sequence

Nothing is downloaded: problems, tokenizer and model (0.34 million parameters, random weights) are made here.

1. Warm start. The model imitates the worked answers of a school class in which two pupils out of three add up whatever
   numbers they see. Imitation cannot tell right from wrong, so the model takes on the class's most common habit.
2. GRPO. The model answers every problem eight times, and all it is told is which of its final numbers are right.
3. Accuracy before and after on problems that it was never trained on, and the curves of the run as a picture.
"""

import argparse
import itertools
import random
import re
import time
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.report import plot_run


STORIES = (  # and the operations that solve them, from left to right
    ("{name} has {0} {thing} and buys {1} more.", "+"),
    ("{name} finds {0} {thing} in the park and {1} at home.", "+"),
    ("{name} has {0} {thing} and loses {1}.", "-"),
    ("{name} had {0} {thing} and gave away {1}.", "-"),
    ("{name} has {0} {thing}, buys {1} and finds {2} more.", "++"),
    ("{name} has {0} {thing}, buys {1} and loses {2}.", "+-"),
    ("{name} has {0} {thing}, gives away {1} and finds {2}.", "-+"),
    ("{name} has {0} {thing}, gives away {1} and loses {2}.", "--"),
)
NAMES = ("Ana", "Ben", "Chen", "Dina", "Emil", "Fatou")
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells")
WARM_START_STEPS = 500
MAX_ANSWER_TOKENS = 20  # "12 + 9 = 21, 21 + 9 = 30" has 15 and the end token

Problem = dict[str, Any]


def work_out(numbers: tuple[int, ...], operations: str) -> tuple[str, list[int]]:
    """The worked answer and its results: ((7, 5, 2), "+-") gives ("7 + 5 = 12, 12 - 2 = 10", [12, 10])."""
    steps, results = [], [numbers[0]]
    for operation, number in zip(operations, numbers[1:], strict=True):
        results.append(results[-1] + number if operation == "+" else results[-1] - number)
        steps.append(f"{results[-2]} {operation} {number} = {results[-1]}")
    return ", ".join(steps), results[1:]


def make_problem(rng: random.Random, text: str, numbers: tuple[int, ...], operations: str) -> Problem:
    """A story with its question, the number that answers it, and what three pupils of the class wrote."""
    thing = rng.choice(THINGS)
    story = text.format(*numbers, name=rng.choice(NAMES), thing=thing)
    careful, results = work_out(numbers, operations)
    careless, _ = work_out(numbers, "+" * len(operations))
    pupils = [f" {careless}", f" {careless}", f" {careful}"]
    return {"prompt": f"{story} How many {thing}?", "answer": results[-1], "pupils": pupils}


def make_problems(rng: random.Random) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and held-out ones. No story is in both with the same numbers, whoever and whatever is in it."""
    train, held_out = [], []
    for text, operations in STORIES:
        ranges = [range(2, 13)] + [range(2, 10)] * len(operations)
        numbers = [n for n in itertools.product(*ranges) if min(work_out(n, operations)[1]) > 0]
        rng.shuffle(numbers)
        cut = min(len(numbers) // 5, 64)
        held_out += [make_problem(rng, text, n, operations) for n in numbers[:cut]]
        train += [make_problem(rng, text, n, operations) for n in rng.choices(numbers[cut:], k=1000)]
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in held_out}
    return train, held_out


def make_tokenizer(problems: list[Problem]) -> PreTrainedTokenizerFast:
    """Words, marks and single digits, each together with the space before it."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?([A-Za-z]+|\d|[^\w\s])"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    trainer = trainers.WordLevelTrainer(special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator((p["prompt"] + answer for p in problems for answer in p["pupils"]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def warm_start(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> None:
    """Plain supervised training on the class's answers."""
    pairs = [(p["prompt"], answer + tokenizer.eos_token) for p in problems for answer in p["pupils"]]
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=WARM_START_STEPS, pct_start=0.1)
    model.train()
    for step in range(1, WARM_START_STEPS + 1):
        rows = [pairs[row] for row in torch.randint(len(pairs), (64,))]
        batch = tokenizer(rows, padding=True, return_tensors="pt", return_token_type_ids=True).to(model.device)
        labels = batch["input_ids"].where(batch["token_type_ids"] == 1, -100)  # type 1 is the answer
        loss = model(input_ids=batch["input_ids"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"  step {step:3}/{WARM_START_STEPS}   loss {loss.item():.3f}")


def correct(completions: list[str], answer: list[int]) -> list[float]:
    """The reward: 1 if the final number is exactly right, else 0. `answer` is a column of the dataset."""
    found = [re.search(r"= (\d+)$", completion) for completion in completions]
    return [float(match is not None and int(match[1]) == right) for match, right in zip(found, answer, strict=True)]


def answer_greedily(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, dataset: Dataset) -> list[str]:
    inputs = tokenizer(dataset["prompt"][:], padding=True, padding_side="left", return_tensors="pt").to(model.device)
    output = model.eval().generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class Progress(TrainerCallback):
    """One line per evaluation in place of Trainer's dictionaries."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        train, held_out = state.log_history[-2:]
        print(
            f"  step {state.global_step:3}/{state.max_steps}   reward {train['reward']:.2f}   "
            f"held-out reward {held_out['eval_reward']:.2f}   policy_signal {train['policy_signal']:.2f}"
        )


def make_config(options: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        output_dir=options.output_dir,
        loss_level=options.loss_level,
        seed=options.seed,
        max_steps=40,
        per_device_train_batch_size=256,  # completions, so 32 problems a step
        num_generations=8,
        max_completion_length=MAX_ANSWER_TOKENS,
        learning_rate=2e-4,  # serves both levels: AdamW does not mind that a sequence's gradient is larger
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        num_generations_eval=1,
        per_device_eval_batch_size=256,
        gradient_checkpointing=False,  # so small a model has no memory to save
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # Apple's GPUs lack the float64 of the metrics
    )


def show_answers(dataset: Dataset, before: list[str], after: list[str]) -> None:
    table = Table("problem", "before GRPO", "after GRPO", title="held-out problems, greedy answers", show_lines=True)
    for row in range(0, len(dataset), len(dataset) // 6):
        answer = dataset[row]["answer"]
        cells = (Text(a.strip(), "green" if correct([a], [answer])[0] else "red") for a in (before[row], after[row]))
        table.add_row(dataset[row]["prompt"], *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss_level", choices=("token", "sequence"), default="token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/quickstart")
    options = parser.parse_args()
    start = time.perf_counter()

    args = make_config(options)
    problems, held_out_problems = make_problems(random.Random(0))  # the same ones whatever the seed
    train, held_out = (Dataset.from_list(p).select_columns(["prompt", "answer"]) for p in (problems, held_out_problems))
    tokenizer = make_tokenizer(problems)
    torch.manual_seed(options.seed)
    model: Any = make_model(tokenizer)
    model.to(args.device)
    print(f"Warm start: {model.num_parameters():,} parameters imitate the class")
    warm_start(model, tokenizer, problems)
    before = answer_greedily(model, tokenizer, held_out)

    print(f"GRPO, loss_level={args.loss_level}: the rewards are those of sampled answers")
    trainer = GRPOTrainer(model, correct, args, train, held_out, tokenizer, callbacks=[Progress()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    after = answer_greedily(model, tokenizer, held_out)

    show_answers(held_out, before, after)
    picture = f"{args.output_dir}/curves.png"
    plot_run(trainer.state.log_history, picture, title=f"loss_level={args.loss_level}, seed={args.seed}")
    print(f"curves: {picture}")
    first, last = (sum(correct(answers, held_out["answer"][:])) / len(held_out) for answers in (before, after))
    print(
        f"held-out greedy accuracy: {first:.1%} before, {last:.1%} after GRPO "
        f"(loss_level={args.loss_level}, seed={args.seed}, {time.perf_counter() - start:.0f} s)"
    )


if __name__ == "__main__":
    main()
