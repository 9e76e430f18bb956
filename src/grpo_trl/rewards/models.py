"""Load reward models with their tokenizers, and compute their rewards."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from .batch import RewardBatch, RewardLogs
from .values import RewardResult


OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForImageClassification")


class ModelReward:
    """A sequence-classification model with one label; its logit is the reward.

    Args:
        model: The reward model.
        tokenizer: Its tokenizer, with a pad token.
        chat_template_kwargs: Passed to the tokenizer's `apply_chat_template` for conversational prompts.
        batch_size: Completions per forward.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: dict[str, Any],
        batch_size: int,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs
        self.batch_size = batch_size
        self.name = model.config._name_or_path.rstrip("/").split("/")[-1] or type(model).__name__

    @torch.no_grad()
    def __call__(self, batch: RewardBatch) -> RewardResult:
        texts = [self._text(p, c) for p, c in zip(batch.prompts, batch.completions, strict=True)]
        device = next(self.model.parameters()).device
        rewards: list[float] = []
        self.model.eval()
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            ).to(device)
            logits = self.model(**inputs).logits
            if logits.shape[1:] != (1,):
                raise ValueError(
                    f"The reward model {self.name!r} returns logits of shape {tuple(logits.shape)} for "
                    f"{len(inputs['input_ids'])} completions; it must return one number for each."
                )
            rewards += logits[:, 0].double().tolist()
        return RewardResult.of(rewards, len(texts), RewardLogs(), self.name)

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return str(self.tokenizer.apply_chat_template(prompt + completion, tokenize=False, **self.chat_template_kwargs))


def load_reward_model(path: str, init_kwargs: dict[str, Any]) -> Any:
    """Load the sequence-classification model with one label at a path or hub name.

    Raises:
        ValueError: There is none, or its checkpoint has no classification head, which would then be random.
    """
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, output_loading_info=True, **init_kwargs
        )
    except OSError as error:
        raise ValueError(
            f"reward_funcs has {path!r}, which is no path or hub name of a model that can be loaded ({error}). Pass a "
            "function itself, not its name."
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"The checkpoint of the reward model {path!r} has no {', '.join(missing[:3])}, which would be random. It was "
            "not saved by a sequence classifier with one label; pass the path of a trained reward model."
        )
    return model


def check_reward_model(model: Any) -> None:
    """Refuse a model that does not return one number per sequence.

    Raises:
        TypeError: It is a language model, a backbone, has another head, or is no model of transformers.
        ValueError: It has several labels.
    """
    kind = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise TypeError(
            f"reward_funcs has a {kind}, which is a torch module but no model of transformers; pass a function that calls "
            "it, def f(completions, **kwargs), or a sequence-classification model."
        )
    remedy = "pass a model of AutoModelForSequenceClassification with num_labels=1 that was trained to give rewards"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    if base.get_output_embeddings() is not None:
        raise TypeError(
            f"reward_funcs has a {kind}, which is a language model: it predicts tokens, not rewards; {remedy}."
        )
    if type(base).__name__ in MODEL_MAPPING_NAMES.values() or type(base).__name__.endswith(OTHER_HEADS):
        raise TypeError(f"reward_funcs has a {kind}, which does not return one number per sequence; {remedy}.")
    if (labels := getattr(model.config, "num_labels", 1)) != 1:
        raise ValueError(f"reward_funcs has a {kind} with num_labels={labels}, and a reward is one number; {remedy}.")


def reward_tokenizer(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a reward model, loaded from the model's own path if None, and give both a pad token.

    Raises:
        ValueError: There is none at the model's path, or the model has none.
        TypeError: It is no tokenizer.
    """
    if tokenizer is None:
        tokenizer = _own_tokenizer(model, trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"reward_processing_classes has a {type(tokenizer).__name__} for a reward model; pass its tokenizer, as "
            "AutoTokenizer.from_pretrained returns it, or None to load it from the model's path."
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of the reward model {type(model).__name__} has neither a pad_token nor an eos_token, and its "
            "texts have to be padded; set tokenizer.pad_token."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A classification head reads the last token that is not padding, which it finds by this id.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _own_tokenizer(model: Any, trust_remote_code: bool) -> Any:
    path = model.config._name_or_path
    problem: Exception | None = None
    if path:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            if tokenizer("reward", add_special_tokens=False)["input_ids"]:  # without files there, it is an empty one
                return tokenizer
        except (OSError, ValueError) as error:
            problem = error
    where = f"at its path, {path!r}" if path else "to be found, since it has no path"
    raise ValueError(
        f"The reward model {type(model).__name__} has no tokenizer {where}; pass it in reward_processing_classes, in the "
        "order of reward_funcs, with None for functions."
    ) from problem
