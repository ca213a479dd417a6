"""Define every key of a training configuration: name (LLaMA-Factory's), type, default and meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from macft.engines import BackendName
from macft.objectives.preference_losses import LOSSES, losses_with

if TYPE_CHECKING:
    LossName: TypeAlias = str
else:
    LossName = Literal[tuple(LOSSES)]


def _papers(needs_reference: bool) -> str:
    """The losses of one sort, each with its paper."""
    return ", ".join(
        f"`{name}` ({loss.paper})" for name, loss in LOSSES.items() if loss.needs_reference == needs_reference
    )


# Values of `lr_scheduler_type` with options -> what `lr_scheduler_kwargs` may hold.
SCHEDULE_OPTIONS = {
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "cosine_with_min_lr": frozenset({"min_lr", "min_lr_rate", "num_cycles"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "inverse_sqrt": frozenset({"timescale"}),
}


class Settings(BaseModel):
    """A training run. Keys and defaults are LLaMA-Factory's unless the description says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    # ---- model
    model_name_or_path: str = Field(
        description="`smollm2-135m`, a hub id, a local folder (HF or MLX layout) or a `.gguf` file."
    )
    adapter_name_or_path: str | None = Field(
        None, description="A PEFT adapter to continue training; its own rank, alpha and targets are used."
    )
    create_new_adapter: bool = Field(
        False, description="`adapter_name_or_path` becomes part of the base, and a fresh adapter is trained on it."
    )
    tokenizer_name_or_path: str | None = Field(
        None, description="A folder or hub id whose tokenizer and template are used. Default: the model's own."
    )
    hub: Literal["hf", "modelscope"] = Field(
        "hf",
        description="Where names of models and data sets that are not local files are looked up. The environment "
        "variable `USE_MODELSCOPE_HUB=1` sets it too.",
    )
    train_from_scratch: bool = Field(
        False,
        description="Start from random weights; only the configuration of `model_name_or_path` is used. Without this "
        "key a folder that holds no weights is an error.",
    )
    model_overrides: dict[str, Any] = Field(
        {}, description="Entries of `config.json` to replace (`{num_hidden_layers: 48}`), for `train_from_scratch`."
    )
    backend: BackendName = Field(
        "auto",
        description="Training engine. `auto`: MLX on a Mac, PyTorch with CUDA, else MLX if its BLAS is fast.",
    )
    quantization_bit: Literal[4, 8] | None = Field(
        None,
        description="Quantize the base at load: MLX affine groups of 64, bitsandbytes (nf4, int8) on CUDA.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute blocks in the backward pass to save memory. LLaMA-Factory's default is on.",
    )

    # ---- method
    stage: Literal["pt", "sft", "dpo", "foodpo", "kto"] = Field(
        "sft",
        description="`pt`: pre-training on texts; `sft`: supervised fine-tuning; `dpo`: preference pairs; "
        "`foodpo`: DPO whose beta grows with the difficulty of the prompt; `kto`: single answers, each rated desirable "
        "or not (arXiv 2402.01306).",
    )
    finetuning_type: Literal["lora", "full"] = Field("lora", description="`lora`, or `full`: every parameter.")
    lora_rank: int = Field(8, ge=1, description="Width of the adapter.")
    lora_alpha: float | None = Field(None, gt=0, description="Scale of the adapter is alpha / rank. Default: 2 x rank.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapter's input; none in preference stages."
    )
    lora_target: str = Field(
        "all",
        description="`all` linear layers inside the blocks, or names separated by commas (`q_proj,v_proj`).",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (arXiv 2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv 2402.09353).")

    # ---- preference
    pref_beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference; scale of the rewards.")
    pref_loss: LossName = Field(
        "sigmoid",
        description=f"The loss, with its paper on arXiv: {_papers(needs_reference=True)}; "
        f"without a reference: {_papers(needs_reference=False)}.",
    )
    pref_ftx: float = Field(
        0.0, ge=0, description="Weight of the supervised loss of the chosen (`kto`: desirable) answer, added."
    )
    dpo_label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description=f"Share of pairs taken to be labeled the wrong way; for {losses_with('dpo_label_smoothing')}.",
    )
    simpo_gamma: float = Field(0.5, ge=0, description="Margin that `simpo` asks for.")
    ld_alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of the tokens by which one answer is longer than the other (arXiv 2409.06411).",
    )
    pref_beta_scale: float = Field(
        0.5,
        description="FooDPO: beta of a pair is `pref_beta` x this x log perplexity of the prompt; 0 or below: "
        "`pref_beta`, as in DPO.",
    )
    foodpo_perplexity: Literal["reference", "policy", "policy_with_gradient"] = Field(
        "reference",
        description="Whose perplexity: the reference's, fixed; the policy's of each step; or the policy's and "
        "trained through (as the original did).",
    )
    foodpo_beta_min: float | None = Field(None, gt=0, description="FooDPO: the least beta of a pair.")
    foodpo_beta_max: float | None = Field(None, gt=0, description="FooDPO: the greatest beta of a pair.")
    kto_chosen_weight: float = Field(1.0, ge=0, description="KTO: weight of the loss of desirable answers.")
    kto_rejected_weight: float = Field(1.0, ge=0, description="KTO: weight of the loss of the others.")
    ref_model: str | None = Field(
        None,
        description="Another model as the reference. Default: the policy at step 0, loaded adapter included "
        "(LLaMA-Factory: the base without it).",
    )
    ref_model_adapters: str | None = Field(
        None, description="A PEFT adapter on `ref_model`, or on the base: the reference."
    )

    # ---- data
    dataset: str = Field(
        description="Files, or names from `dataset_dir` and its `dataset_info.json`, separated by commas."
    )
    eval_dataset: str | None = Field(None, description="As `dataset`; what `eval_loss` is computed on.")
    dataset_dir: str = Field("data", description="Folder where names in `dataset` are looked up.")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = Field(
        "concat",
        description="Several data sets: one after the other, or drawn in turn until the first (`interleave_under`) "
        "or the last (`interleave_over`) is used up, or until all are, each once (`interleave_once`).",
    )
    interleave_probs: list[float] | None = Field(
        None, description="With what probability each data set is drawn from (`0.7,0.3`). Default: all alike."
    )
    template: str | None = Field(
        None,
        description="LLaMA-Factory's name of a template (`qwen3_nothink`, `llama3`), a Jinja chat template file, or "
        "`empty`: only the texts, answers closed by the end token. Default: the model's own.",
    )
    default_system: str | None = Field(
        None, description="System prompt of rows that have none. Default: what the template says."
    )
    enable_thinking: bool = Field(
        True, description="Whether the templates of reasoning models are rendered in their thinking form."
    )
    cutoff_len: int = Field(2048, ge=2, description="Longest example in tokens; what is longer loses user text.")
    max_samples: int | None = Field(None, ge=1, description="Take only the first examples of each data set.")
    val_size: float = Field(0.0, ge=0, description="Held out for evaluation: a share below 1, else a count.")
    packing: bool | None = Field(
        None,
        description="Fill rows of `cutoff_len` with several examples, which do not see each other. Default: yes for "
        "`pt`, else no.",
    )
    train_on_prompt: bool = Field(False, description="Train on every token, not only on the answers (`sft`).")
    mask_history: bool = Field(False, description="Train on the last answer of a conversation only (`sft`).")
    streaming: bool = Field(
        False, description="Read the data while training and keep nothing of it on disk; needs `max_steps`."
    )
    buffer_size: int = Field(16384, ge=1, description="How many examples of a stream are shuffled at a time.")
    overwrite_cache: bool = Field(False, description="Tokenize again what an earlier run has cached.")
    preprocessing_num_workers: int | None = Field(
        None, ge=1, description="Processes that tokenize. Default: one per core."
    )

    # ---- training
    per_device_train_batch_size: int = Field(8, ge=1, description="Examples in one forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes in one optimizer step.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate.")
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the data.")
    max_steps: int = Field(-1, description="Optimizer steps; above 0 it overrides `num_train_epochs`.")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "constant",
        "constant_with_warmup",
    ] = Field("linear", description="Learning rate schedule after the warmup.")
    lr_scheduler_kwargs: dict[str, float] = Field(
        {},
        description="Options of that schedule: `num_cycles` (cosine, also with restarts or min_lr), `min_lr` or "
        "`min_lr_rate` (cosine_with_min_lr), `lr_end`, `power` (polynomial), `timescale` (inverse_sqrt).",
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="Share of all steps in which the rate rises from 0.")
    warmup_steps: int = Field(0, ge=0, description="The same as a count; above 0 it overrides `warmup_ratio`.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of matrices; biases and norms have none.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0: never.")
    bf16: bool | None = Field(
        None,
        description="Compute in bfloat16. Default: yes on Metal and on CUDA devices that have it, no on a CPU.",
    )
    fp16: bool = Field(False, description="Compute in float16, where the device trains in it.")
    group_by_length: bool = Field(
        True,
        description="Examples of similar length share a step, which saves padding. LLaMA-Factory's default is off.",
    )
    disable_shuffling: bool = Field(
        False, description="Take the examples in the order of the files, whatever `group_by_length` says."
    )
    seed: int = Field(42, ge=0, description="Seed of the adapter's start, of the data order and of dropout.")
    data_seed: int | None = Field(None, ge=0, description="A seed of its own for the data order.")

    # ---- evaluation
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None, description="When to evaluate. Default: each epoch if there is evaluation data, else `no`."
    )
    eval_steps: int | None = Field(None, ge=1, description="For `eval_strategy: steps`. Default: `logging_steps`.")
    per_device_eval_batch_size: int = Field(8, ge=1, description="Examples in one forward pass of an evaluation.")
    load_best_model_at_end: bool = Field(False, description="End with the best checkpoint, not with the last.")
    metric_for_best_model: str | None = Field(
        None, description="Metric of the evaluation (`eval_rewards/margins`) that says so. Default: `eval_loss`."
    )
    greater_is_better: bool | None = Field(
        None, description="Whether more of it is better. Default: yes, unless its name ends in `loss`."
    )
    early_stopping_steps: int | None = Field(
        None, ge=1, description="Stop after so many evaluations in a row without a better one."
    )

    # ---- output
    output_dir: str = Field(description="The run folder.")
    overwrite_output_dir: bool = Field(False, description="Start over in a folder that already holds a run.")
    resume_from_checkpoint: bool | str = Field(
        False, description="`true`: continue from the newest checkpoint in `output_dir`; or the path of one."
    )
    logging_steps: int = Field(
        10, ge=1, description="Steps per row of `trainer_log.jsonl`. LLaMA-Factory's 500 hides short runs."
    )
    save_strategy: Literal["no", "steps", "epoch"] = Field("steps", description="When to write a checkpoint.")
    save_steps: int = Field(500, ge=1, description="For `save_strategy: steps`.")
    save_total_limit: int | None = Field(None, ge=1, description="Keep only so many of the newest checkpoints.")
    save_only_model: bool = Field(False, description="Checkpoints without optimizer state; they cannot be resumed.")
    plot_loss: bool = Field(True, description="Draw `training_loss.png`. LLaMA-Factory's default is off.")
    report_to: str = Field("none", description="`none`, or some of tensorboard, wandb, swanlab (commas).")
    run_name: str | None = Field(None, description="Name of the run in those.")

    @field_validator("lora_target", "dataset", "eval_dataset", "report_to", mode="before")
    @classmethod
    def _join_lists(cls, value: object) -> object:
        return ",".join(map(str, value)) if isinstance(value, list) else value

    @field_validator("interleave_probs", mode="before")
    @classmethod
    def _split_numbers(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("model_overrides", "lr_scheduler_kwargs", mode="before")
    @classmethod
    def _null_is_empty(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("resume_from_checkpoint", "report_to", "eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _yaml_nulls(cls, value: object, info: ValidationInfo) -> object:
        # YAML reads a bare `no` as false and an empty value as null
        name = info.field_name
        if name == "resume_from_checkpoint":
            return False if value is None else value
        if name == "report_to":
            return "none" if value is None or value is False or value == "" else value
        return "no" if value is False else value

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, value: object, info: ValidationInfo) -> object:
        # Python counts true as 1
        annotation = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and ("int" in annotation or "float" in annotation) and "dict" not in annotation:
            raise PydanticCustomError("float_type", "Input should be a number")
        return value

    @property
    def has_pairs(self) -> bool:
        """Whether the examples are pairs."""
        return self.stage in ("dpo", "foodpo")

    @property
    def is_preference(self) -> bool:
        """Whether the examples are pairs, or single answers with a rating."""
        return self.has_pairs or self.stage == "kto"

    @property
    def is_packed(self) -> bool:
        """`packing`, or its default: yes for pre-training."""
        return self.stage == "pt" if self.packing is None else self.packing

    @property
    def sorts_by_length(self) -> bool:
        """Whether examples of similar length share a step: a given order, a stream or packed rows leave no choice."""
        return self.group_by_length and not (self.disable_shuffling or self.streaming or self.is_packed)

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return self.stage == "kto" or (self.has_pairs and LOSSES[self.pref_loss].needs_reference)

    @property
    def names_reference(self) -> bool:
        """Whether the reference is another model than the policy at its start."""
        return self.ref_model is not None or self.ref_model_adapters is not None

    @property
    def asks_prompts(self) -> bool:
        """Whether the strength of a pair depends on its prompt."""
        return self.stage == "foodpo" and self.pref_beta_scale > 0

    @property
    def when_to_evaluate(self) -> Literal["no", "steps", "epoch"]:
        """`eval_strategy`, or its default: each epoch (of a stream: `eval_steps`) if there is evaluation data."""
        if not (self.eval_dataset or self.val_size):
            return "no"
        # a stream has no epochs
        return self.eval_strategy or ("steps" if self.streaming else "epoch")

    @property
    def steps_per_evaluation(self) -> int:
        """`eval_steps`, or its default."""
        return self.eval_steps or self.logging_steps

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or its default."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.lora_rank

    @property
    def precision(self) -> str:
        """The precision that `bf16` and `fp16` ask for: auto, float32, bfloat16 or float16."""
        if self.fp16:
            return "float16"
        if self.bf16 is None:
            return "auto"
        return "bfloat16" if self.bf16 else "float32"
