"""What scripts and callbacks that were written for TRL's trainer touch of it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..models import eos_token_ids
from ..objective.entropy import entropy_threshold
from ..objective.loss import policy_gap
from ..objective.ratios import EXP_LIMIT
from ..objective.surrogates import Vespo
from ..reference import Reference
from ..report import append_objective
from ..rewards.call import FunctionReward
from .entropy import EntropyControl
from .evaluation import EvaluatingTrainer
from .noted import NotedMetrics
from .runner import RolloutRunner


def _option(name: str) -> Any:
    return property(lambda self: getattr(self.args, name), doc=f"The option `{name}`.")


class TrlInterface(EvaluatingTrainer):
    """Names of TRL's `GRPOTrainer` that are not of `transformers.Trainer`; options are those of `args`."""

    _entropy: EntropyControl
    _runner: RolloutRunner
    _reference: Reference | None

    beta = _option("beta")
    chat_template_kwargs = _option("template_kwargs")
    epsilon_low = _option("epsilon")
    generation_kwargs = _option("generation_kwargs")
    importance_sampling_level = _option("importance_sampling_level")
    log_completions = _option("log_completions")
    log_unique_prompts = _option("log_unique_prompts")
    loss_type = _option("loss_type")
    mask_truncated_completions = _option("mask_truncated_completions")
    max_completion_length = _option("max_completion_length")
    min_p = _option("min_p")
    multi_objective_aggregation = _option("multi_objective_aggregation")
    num_completions_to_print = _option("num_completions_to_print")
    num_generations = _option("num_generations")
    num_generations_eval = _option("eval_generations")
    num_iterations = _option("num_iterations")
    off_policy_mask_threshold = _option("off_policy_mask_threshold")
    repetition_penalty = _option("repetition_penalty")
    scale_rewards = _option("scale_rewards")
    shuffle_dataset = _option("shuffle_dataset")
    temperature = _option("temperature")
    top_entropy_quantile = _option("top_entropy_quantile")
    top_k = _option("top_k")
    top_p = _option("top_p")
    use_adaptive_entropy = _option("use_adaptive_entropy")
    use_vllm = _option("use_vllm")
    vllm_gpu_memory_utilization = _option("vllm_gpu_memory_utilization")
    vllm_importance_sampling_clip_max = _option("vllm_importance_sampling_clip_max")
    vllm_importance_sampling_clip_min = _option("vllm_importance_sampling_clip_min")
    vllm_importance_sampling_correction = _option("vllm_importance_sampling_correction")
    vllm_importance_sampling_mode = _option("vllm_importance_sampling_mode")
    vllm_mode = _option("vllm_mode")
    vllm_tensor_parallel_size = _option("vllm_tensor_parallel_size")

    @property
    def epsilon_high(self) -> float:
        return self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high

    @property
    def entropy_coef(self) -> float:
        """The weight of the entropy bonus, as it has been adapted so far."""
        return self._entropy.coefficient

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a completion."""
        return list(eos_token_ids(self.model, self.processing_class))

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference, where it is a model of its own: None without a KL term, and with an adapter."""
        return None if self._reference is None else self._reference.model

    @property
    def reward_funcs(self) -> list[Any]:
        """The reward functions and reward models, loaded."""
        return [f.function if isinstance(f, FunctionReward) else f.model for f in self._runner.rewards.functions]

    @property
    def reward_func_names(self) -> list[str]:
        return self._runner.rewards.names

    @property
    def reward_weights(self) -> Tensor:
        return self._runner.rewards.weights_F

    @property
    def reward_processing_classes(self) -> list[Any]:
        """The tokenizers of reward models, None for functions."""
        return [getattr(function, "tokenizer", None) for function in self._runner.rewards.functions]

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """Mask of the tokens whose entropy is at or above the quantile `threshold` of those in `mask`, on all ranks."""
        accelerator = self.accelerator
        own_N = accelerator.pad_across_processes(entropies[mask.bool()].float(), dim=0, pad_index=-1)
        all_N = accelerator.gather(own_N)
        return mask.bool() & (entropies >= entropy_threshold(all_N[all_N >= 0], 1 - threshold))

    @staticmethod
    def get_off_policy_mask(
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """Mask, as numbers of shape (B, 1), of the completions that `off_policy_mask_threshold` keeps."""
        gap_B1 = policy_gap(per_token_logps, sampling_per_token_logps, mask.bool())
        return ((advantages >= 0) | (gap_B1 <= off_policy_threshold)).to(mask.dtype)

    @staticmethod
    def get_gamma_weights(
        advantages: Tensor,
        log_ratio_per_token: Tensor,
        mask: Tensor,
        importance_sampling_ratio: Tensor | None = None,
        k_pos: float = 2.0,
        lambda_pos: float = 3.0,
        k_neg: float = 3.0,
        lambda_neg: float = 2.0,
    ) -> Tensor:
        """Weights of shape (B, 1) of `loss_type="vespo"`; ratios to another sampler multiply those to the old policy."""
        log_ratio_BT = log_ratio_per_token.detach() * mask
        if importance_sampling_ratio is not None:
            log_ratio_BT = log_ratio_BT + importance_sampling_ratio.log().clamp(min=-EXP_LIMIT)
        log_ratio_B1 = log_ratio_BT.sum(1, keepdim=True).clamp(max=EXP_LIMIT)
        return Vespo(k_pos, lambda_pos, k_neg, lambda_neg).phi(log_ratio_B1, advantages)

    @property
    def _metrics(self) -> dict[str, NotedMetrics]:
        """What scripts add to the next log of training or evaluation: `_metrics["train"][name].append(value)`."""
        return {mode: NotedMetrics(log) for mode, log in self._noted.items()}

    def create_model_card(  # type: ignore[override]  # TRL's order of arguments
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a model card with the objective and its papers to `output_dir`.

        Args:
            model_name: That of the folder by default.
            dataset_name: The name of the dataset on the hub.
            tags: Further tags.
            kwargs: As in `transformers.Trainer.create_model_card`.
        """
        named = {} if dataset_name is None else {"dataset_tags": dataset_name, "dataset": dataset_name}
        super().create_model_card(model_name=model_name, tags=tags, **(named | kwargs))
        if self.is_world_process_zero():
            append_objective(Path(str(self.args.output_dir)) / "README.md", self.args)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: there are no labels to predict.

        Raises:
            ValueError: Always; it names what to use.
        """
        raise ValueError(
            "predict() has no labels to predict; use evaluate(dataset), which samples and rewards completions."
        )
