"""Methods that subclasses of TRL's trainer override, and `GRPOTrainer` does not call."""

_SAMPLING = "pass a rollout_func, which gets prompts and returns completions"
_LOGPROBS = "override compute_loss, which gets a MicroBatch, or set the options of the objective"
_OBJECTIVE = "set the options of the objective"
_ORDER = "order the dataset, and set shuffle_dataset=False"
_TOOLS = "call tools from a rollout_func"
_EVALUATION = "override evaluate, or pass compute_metrics"

NOT_CALLED = {
    "_calculate_rewards": "pass reward_funcs, and advantage_func, which gets their rewards by group",
    "_compute_loss": _LOGPROBS,
    "_generate": _SAMPLING,
    "_generate_and_score_completions": (
        "pass a rollout_func to sample, reward_funcs to reward, and advantage_func to change advantages"
    ),
    "_generate_single_turn": _SAMPLING,
    "_get_eval_sampler": _EVALUATION,
    "_get_last_hidden_state": _LOGPROBS,
    "_get_per_token_logps": _LOGPROBS,
    "_get_per_token_logps_and_entropies": _LOGPROBS,
    "_get_tool_suffix_ids": _TOOLS,
    "_get_train_sampler": _ORDER,
    "_log_completion_extra": "call log_extra, which reward functions get",
    "_log_metric": "call log_metric, which reward functions get",
    "_move_model_to_vllm": "set vllm_mode",
    "_set_signature_columns_if_needed": "remove it: all columns are kept unless remove_unused_columns=True",
    "_tokenize_prompts": "set chat_template_kwargs, or render the prompts of the dataset",
    "_tool_call_loop": _TOOLS,
    "evaluation_loop": _EVALUATION,
    "get_eval_dataloader": _EVALUATION,
    "get_gamma_weights": _OBJECTIVE,
    "get_high_entropy_mask": _OBJECTIVE,
    "get_off_policy_mask": _OBJECTIVE,
    "prediction_step": _EVALUATION,
}
"""What to do instead of overriding a method of TRL's trainer."""


def check_overrides(kind: type, trainer: type) -> None:
    """Refuse a subclass of `trainer` with methods that would never be called.

    Raises:
        TypeError: It has one; the message says what to do instead.
    """
    for base in kind.__mro__[: kind.__mro__.index(trainer)]:
        for name in vars(base):
            if name in NOT_CALLED:
                raise TypeError(
                    f"{base.__name__} overrides {name}, which grpo_trl.GRPOTrainer does not call; {NOT_CALLED[name]}."
                )
